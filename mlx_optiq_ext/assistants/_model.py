"""The decoder of a Gemma-4 assistant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.gemma4_text import DecoderLayer, ModelArgs, logit_softcap

# Keys and values of the target by type of layer, [batch, heads, num_tokens, head_dim].
SharedKV = dict[str, tuple[mx.array, ...]]

SLIDING = "sliding_attention"
# Entries that a query sees beyond its window: Hugging Face counts the window from the
# query's own position, with both ends. Other implementations see one or two fewer.
NUM_BEYOND_WINDOW = 1

_ORDERING = "masked_embedding.token_ordering"
# What makes a Gemma-4 decoder an assistant, whatever the defaults of mlx-lm are.
_FIXED = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}


@dataclass
class AssistantArgs(BaseModelArgs):
    """``config.json`` of an assistant, and what of other files belongs to it."""

    text_config: dict[str, Any]
    backbone_hidden_size: int
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    tie_word_embeddings: bool = True
    suppress_tokens: Sequence[int] = ()

    def layers(self) -> list[ModelArgs]:
        """The arguments of each layer; all but the head sizes are the same."""
        config = self.text_config
        defaults = {"final_logit_softcapping": None}
        if "per_layer_config" in config:
            defaults["global_head_dim"] = None
        args = ModelArgs.from_dict(defaults | config | _FIXED)
        args.num_kv_shared_layers = args.num_hidden_layers
        own = config.get("per_layer_config") or {}
        sizes = [
            own.get(str(index), {}).get("head_dim")
            for index in range(args.num_hidden_layers)
        ]
        return [
            replace(args, head_dim=size, global_head_dim=size) if size else args
            for size in sizes
        ]


class Assistant(nn.Module):
    """Drafts one token from the state and the keys and values of its target.

    Each step reads the embedding of the last token, as the target scales it, and the
    state that predicted it. The keys and values are those of the target's last own
    layer of each type; there are none of the assistant's, and so all steps of a draft
    have the same position.

    Math: Hugging Face's ``Gemma4AssistantForCausalLM``.

    Args:
        args (AssistantArgs): The configuration.
    """

    def __init__(self, args: AssistantArgs):
        super().__init__()
        layers = args.layers()
        text, width = layers[0], args.backbone_hidden_size
        self.args = args
        self.text_args = text
        self.model = _Decoder(layers)
        self.pre_projection = nn.Linear(2 * width, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, width, bias=False)
        if not args.tie_word_embeddings:
            # Has the names of a linear layer and can also look up some of its rows.
            self.lm_head = nn.Embedding(text.vocab_size, text.hidden_size)
        if args.use_ordered_embeddings:
            self.masked_embedding = CentroidHead(args, text)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    @property
    def dtype(self) -> mx.Dtype:
        return self.model.norm.weight.dtype

    def visible(self, shared_kv: SharedKV) -> SharedKV:
        """What the assistant sees of its target's keys and values.

        Args:
            shared_kv (dict): All of them, in the order of the tokens.
        """
        num_visible = self.text_args.sliding_window + NUM_BEYOND_WINDOW
        return {
            kind: tuple(
                (x[..., -num_visible:, :] if kind == SLIDING else x).astype(self.dtype)
                for x in keys_and_values
            )
            for kind, keys_and_values in shared_kv.items()
        }

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: SharedKV,
        position: int,
    ) -> tuple[mx.array, mx.array]:
        """Run one step.

        Args:
            embedding (mx.array): Of the last token, scaled, ``[batch, 1, backbone]``.
            hidden (mx.array): The target's state that predicted it, or for any but the
              first step what the last one returned, of the same shape.
            shared_kv (dict): What ``visible`` returned.
            position (int): Of the query.

        Returns:
            tuple[mx.array, mx.array]: Logits ``[batch, 1, vocab]``, and the state for
            the next step, ``[batch, 1, backbone]``.
        """
        x = mx.concatenate([embedding, hidden], axis=-1).astype(self.dtype)
        x = self.pre_projection(x)
        for layer in self.layers:
            kv = shared_kv[layer.layer_type]
            x, _, _ = layer(x, shared_kv=kv, offset=position)
        x = self.model.norm(x)
        return self._logits(x), self.post_projection(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out what the configuration says is not used."""
        unused = ["lm_head."] if self.args.tie_word_embeddings else []
        if not self.args.use_ordered_embeddings:
            # Some checkpoints have the sizes of a centroid head and no such head.
            unused.append("masked_embedding.")
        weights = {k: x for k, x in weights.items() if not k.startswith(tuple(unused))}
        if (ordering := weights.get(_ORDERING)) is not None:
            weights[_ORDERING] = ordering.astype(mx.int32)
        return weights

    def _logits(self, x: mx.array) -> mx.array:
        table = self.model.embed_tokens if "lm_head" not in self else self.lm_head
        if self.args.use_ordered_embeddings:
            logits = self.masked_embedding(x, table)
        else:
            logits = table.as_linear(x)
        # Changes no order, so Hugging Face, which takes the first token, has none. Here
        # tokens are drawn, and a checkpoint that names a cap was trained with it.
        if (cap := self.text_args.final_logit_softcapping) is not None:
            logits = logit_softcap(cap, logits)
        if self.args.suppress_tokens:
            logits[..., mx.array(self.args.suppress_tokens)] = -mx.inf
        return logits


class _Decoder(nn.Module):
    """Names the weights as they are stored."""

    def __init__(self, layers: list[ModelArgs]):
        super().__init__()
        args = layers[0]
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(own, index) for index, own in enumerate(layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class CentroidHead(nn.Module):
    """Scores the tokens of the best clusters, and no others.

    Args:
        args (AssistantArgs): Says how many clusters there are, and how many are best.
        text (ModelArgs): Sizes of the vocabulary and of the states.
    """

    def __init__(self, args: AssistantArgs, text: ModelArgs):
        super().__init__()
        self.num_best = args.centroid_intermediate_top_k
        self.centroids = nn.Linear(text.hidden_size, args.num_centroids, bias=False)
        self.token_ordering = mx.zeros((text.vocab_size,), mx.int32)

    def __call__(self, x: mx.array, table: nn.Embedding) -> mx.array:
        """Logits, minus infinity for any other token.

        Hugging Face puts a finite value there, which keeps the order but would leave
        most of a sampled distribution to tokens that nobody scored.
        """
        scores = self.centroids(x)
        best = mx.argpartition(scores, -self.num_best, axis=-1)[..., -self.num_best :]
        clusters = self.token_ordering.reshape(scores.shape[-1], -1)
        tokens = clusters[best].flatten(-2)
        selected = (table(tokens) @ x[..., None]).squeeze(-1)
        shape = (*x.shape[:-1], self.token_ordering.size)
        logits = mx.full(shape, -mx.inf, selected.dtype)
        return mx.put_along_axis(logits, tokens, selected, axis=-1)
