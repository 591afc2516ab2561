"""The decoder of a Gemma-4 assistant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.gemma4_text import DecoderLayer, ModelArgs, logit_softcap

# These are the target's keys and values by type of layer, each of the shape
# [batch, heads, num_tokens, head_dim].
SharedKV = dict[str, tuple[mx.array, ...]]

SLIDING = "sliding_attention"
# A query sees this many tokens beyond its window: Hugging Face counts the window from
# the query's own position, with both ends. Others see one or two fewer.
NUM_BEYOND_WINDOW = 1

_ORDERING = "masked_embedding.token_ordering"
# An assistant is a Gemma-4 decoder with these settings, whatever mlx-lm's defaults are.
_FIXED = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}


@dataclass
class AssistantArgs(BaseModelArgs):
    """The arguments of an assistant, which are those of its ``config.json``.

    Args:
        text_config (dict): The arguments of the decoder, as mlx-lm's ``ModelArgs``.
        backbone_hidden_size (int): The size of the target's states.
        use_ordered_embeddings (bool): Whether only the tokens of the best centroids
          are scored.
        num_centroids (int): The number of centroids.
        centroid_intermediate_top_k (int): The number of centroids whose tokens are
          scored.
        tie_word_embeddings (bool): Whether the output layer is the embedding.
        suppress_tokens (Sequence[int]): Tokens that are never drafted. They come from
          ``generation_config.json``.
    """

    text_config: dict[str, Any]
    backbone_hidden_size: int
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    tie_word_embeddings: bool = True
    suppress_tokens: Sequence[int] = ()

    def layers(self) -> list[ModelArgs]:
        """Return the arguments of each layer, which differ in the head sizes only."""
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
    """A decoder that drafts one token from its target's state, keys and values.

    Each step reads the embedding of the last token, as the target scales it, and the
    state that predicted it. For each type of layer, the keys and values are those of
    the last layer of the target that computes its own. The assistant adds none to them,
    so all steps of a draft have the same position.

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
            # This has the names of a linear layer and can look up some of its rows.
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
        """Cut the target's keys and values to what the assistant sees.

        Args:
            shared_kv (dict): All keys and values of the target, in the order of the
              tokens.
        """
        num_visible = self.text_args.sliding_window + NUM_BEYOND_WINDOW
        return {
            kind: tuple(
                (x[..., -num_visible:, :] if kind == SLIDING else x).astype(self.dtype)
                for x in keys_and_values
            )
            for kind, keys_and_values in shared_kv.items()
        }

    def mask(self, kind: str, num_keys: int, num_rows: mx.array) -> mx.array:
        """Mask the keys of several sequences that the assistant does not see.

        Args:
            kind (str): The type of layer.
            num_keys (int): The number of keys of each sequence, with padding behind.
            num_rows (mx.array): How many of them are no padding, ``[num_sequences]``.

        Returns:
            mx.array: The keys that are seen, ``[num_sequences, 1, 1, num_keys]``.
        """
        rows, num_rows = mx.arange(num_keys), num_rows[:, None, None, None]
        is_seen = rows < num_rows
        if kind == SLIDING:
            num_visible = self.text_args.sliding_window + NUM_BEYOND_WINDOW
            is_seen = is_seen & (rows >= num_rows - num_visible)
        return is_seen

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        shared_kv: SharedKV,
        position: int | mx.array,
        masks: Mapping[str, mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Run one step.

        Args:
            embedding (mx.array): The scaled embedding of the last token,
              ``[batch, 1, backbone_hidden_size]``.
            hidden (mx.array): The state of the target that predicted the last token, or
              the state that the step before returned, of the same shape.
            shared_kv (dict): The keys and values that ``visible`` returned.
            position (int or mx.array): The position of the query, in tokens; for each
              sequence, ``[batch]``, where they differ.
            masks (dict, optional): The keys that are seen, by type of layer. Default:
              all.

        Returns:
            tuple[mx.array, mx.array]: The logits, ``[batch, 1, vocab_size]``, and the
            state for the next step, ``[batch, 1, backbone_hidden_size]``.
        """
        x = mx.concatenate([embedding, hidden], axis=-1).astype(self.dtype)
        x = self.pre_projection(x)
        for layer in self.layers:
            kind = layer.layer_type
            mask = None if masks is None else masks[kind]
            x, _, _ = layer(x, mask, shared_kv=shared_kv[kind], offset=position)
        x = self.model.norm(x)
        return self._logits(x), self.post_projection(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop the weights that the configuration says are not used."""
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
        # A cap keeps the order of the logits, so Hugging Face, which drafts greedily,
        # leaves it out. Here drafts are sampled, and a checkpoint that names a cap was
        # trained with it.
        if (cap := self.text_args.final_logit_softcapping) is not None:
            logits = logit_softcap(cap, logits)
        if self.args.suppress_tokens:
            logits[..., mx.array(self.args.suppress_tokens)] = -mx.inf
        return logits


class _Decoder(nn.Module):
    """The layers of an assistant, under the names that their weights have."""

    def __init__(self, layers: list[ModelArgs]):
        super().__init__()
        args = layers[0]
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(own, index) for index, own in enumerate(layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class CentroidHead(nn.Module):
    """An output layer that scores the tokens of the best clusters, and no others.

    Args:
        args (AssistantArgs): The number of clusters, and how many of them are scored.
        text (ModelArgs): The sizes of the vocabulary and of the states.
    """

    def __init__(self, args: AssistantArgs, text: ModelArgs):
        super().__init__()
        self.num_best = args.centroid_intermediate_top_k
        self.centroids = nn.Linear(text.hidden_size, args.num_centroids, bias=False)
        self.token_ordering = mx.zeros((text.vocab_size,), mx.int32)

    def __call__(self, x: mx.array, table: nn.Embedding) -> mx.array:
        """Compute logits, which are minus infinity for tokens of other clusters.

        Hugging Face gives those tokens a finite value. That keeps the order, but would
        leave most of a sampled distribution to tokens that were not scored.

        Args:
            x (mx.array): Hidden states, ``[..., hidden_size]``.
            table (nn.Embedding): The rows of the output layer, one for each token.
        """
        scores = self.centroids(x)
        best = mx.argpartition(scores, -self.num_best, axis=-1)[..., -self.num_best :]
        clusters = self.token_ordering.reshape(scores.shape[-1], -1)
        tokens = clusters[best].flatten(-2)
        selected = (table(tokens) @ x[..., None]).squeeze(-1)
        shape = (*x.shape[:-1], self.token_ordering.size)
        logits = mx.full(shape, -mx.inf, selected.dtype)
        return mx.put_along_axis(logits, tokens, selected, axis=-1)
