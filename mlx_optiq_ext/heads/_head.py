"""The MTP head of Qwen3.5, Qwen3.6 and Qwen3.8 models."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen3_5 import DecoderLayer, TextModelArgs

from ._locate import StoredHead, Tensors


class MTPHead(nn.Module):
    """Predicts the token after next, one decoder layer deep.

    Position ``p`` takes the target's state there and the embedding of token ``p + 1``,
    and its output, projected as the target's states are, predicts token ``p + 2``. The
    output also stands in for the state that the target has not computed yet.

    Math: DeepSeek-V3 (arXiv:2412.19437, section 2.2), save that the embedding comes
    first and that the state is the one after the target's last norm.

    Args:
        args (TextModelArgs): The arguments of the target, with the sizes of the head's
          own MLP.
    """

    def __init__(self, args: TextModelArgs):
        super().__init__()
        size, eps = args.hidden_size, args.rms_norm_eps
        self.pre_fc_norm_embedding = nn.RMSNorm(size, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        # Only the index decides that a layer has full attention.
        self.layers = [DecoderLayer(args, layer_idx=args.full_attention_interval - 1)]
        self.norm = nn.RMSNorm(size, eps=eps)

    def __call__(
        self, embeddings: mx.array, hidden: mx.array, cache: KVCache | None = None
    ) -> mx.array:
        """Run the head over consecutive positions.

        Args:
            embeddings (mx.array): The embeddings of the tokens after each position,
              ``[batch, num_tokens, hidden_size]``.
            hidden (mx.array): The target's states after its last norm, or the head's
              own output where there are none yet, of the same shape.
            cache (KVCache, optional): The head's own cache, with all earlier positions.

        Returns:
            mx.array: The states to project to logits, of the same shape.
        """
        x = mx.concatenate(
            [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)],
            axis=-1,
        )
        x = self.fc(x)
        x = self.layers[0](x, create_attention_mask(x, cache), cache)
        return self.norm(x)


def head_args(
    stored: StoredHead, weights: Tensors, args: TextModelArgs
) -> TextModelArgs:
    """Put the sizes of a head's MLP into the arguments of its target.

    They may differ from the target's: pruning its experts leaves the head as it was.

    Raises:
        SpeculationError: If one of head and target is a mixture of experts.
    """

    def shape(name: str, *default: int) -> tuple[int, ...]:
        weight = weights.get(f"layers.0.mlp.{name}.weight")
        return default if weight is None else weight.shape

    has_experts = any(".switch_mlp." in name for name in weights)
    if has_experts != (args.num_experts > 0):
        kinds = ["dense", "a mixture of experts"]
        raise stored.error(
            f"it is {kinds[has_experts]} and the model is {kinds[not has_experts]}, so "
            "it is the head of another model."
        )
    if not has_experts:
        return replace(args, intermediate_size=shape("gate_proj", 1)[0])
    num_experts, expert_size = shape("switch_mlp.gate_proj", 1, 1)[:2]
    return replace(
        args,
        num_experts=num_experts,
        moe_intermediate_size=expert_size,
        shared_expert_intermediate_size=shape("shared_expert.gate_proj", 1)[0],
    )
