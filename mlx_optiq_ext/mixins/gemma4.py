"""Lets Gemma-4 models of mlx-lm show the states, keys and values an assistant reads."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4, gemma4_text
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from .._errors import SpeculationError
from ..assistants import SharedKV
from ._swap import add_mixin


class SharedKVMixin:
    """A Gemma-4 model that shows its states, keys and values."""

    @property
    def text_model(self) -> gemma4_text.Model:
        """Return the model itself, or the text model in it if it also reads images."""
        return self.language_model if isinstance(self, gemma4.Model) else self

    @property
    def donors(self) -> dict[str, int]:
        """Find the last layer of each type that has keys and values of its own.

        Returns:
            dict: The index of the layer, and of its cache entry, by type of layer.
        """
        layers = enumerate(self.text_model.layers)
        return {layer.layer_type: i for i, layer in layers if layer.self_attn.has_kv}

    def hidden_states(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Compute the states after the last norm, ``[batch, num_tokens, hidden_size]``.

        Args:
            inputs (mx.array): Tokens, ``[batch, num_tokens]``.
            cache (list, optional): The model's prompt cache, which is updated.
            input_embeddings (mx.array, optional): Embeddings to read in place of the
              tokens' own, not yet scaled, ``[batch, num_tokens, hidden_size]``.
        """
        return self.text_model.model(
            inputs, cache=cache, input_embeddings=input_embeddings
        )

    def project(self, hidden: mx.array) -> mx.array:
        """Project states to logits, ``[batch, num_tokens, vocab_size]``, and cap them.

        Args:
            hidden (mx.array): Hidden states, ``[batch, num_tokens, hidden_size]``.
        """
        text = self.text_model
        if text.tie_word_embeddings:
            logits = text.model.embed_tokens.as_linear(hidden)
        else:
            logits = text.lm_head(hidden)
        cap = text.final_logit_softcapping
        return logits if cap is None else gemma4_text.logit_softcap(cap, logits)

    def embed(self, tokens: mx.array) -> mx.array:
        """Look up the embeddings of tokens, scaled as the first layer reads them.

        Args:
            tokens (mx.array): Tokens, in an array of any shape.

        Returns:
            mx.array: Embeddings, ``[..., hidden_size]``.
        """
        decoder = self.text_model.model
        return decoder.embed_tokens(tokens) * decoder.embed_scale

    def shared_kv(self, cache: list[Any]) -> SharedKV:
        """Read the keys and values that an assistant attends to, by type of layer.

        Args:
            cache (list): The model's prompt cache, of which no entry is empty.

        Returns:
            dict: Keys and values, ``[1, heads, num_tokens, head_dim]`` each, in the
            order of the tokens. Tokens before a sliding window are missing.
        """
        return {kind: _keys_and_values(cache[i]) for kind, i in self.donors.items()}


def attach_shared_kv(model: nn.Module) -> None:
    """Let a Gemma-4 model be the target of an assistant.

    Parameters, modules and outputs of the model stay as they are.

    Args:
        model (nn.Module): A model that mlx-lm loaded.

    Raises:
        SpeculationError: If the model is of another family.
    """
    if not isinstance(model, (gemma4.Model, gemma4_text.Model)):
        name = getattr(model, "model_type", type(model).__name__)
        raise SpeculationError(
            f"Cannot speculate with an assistant: the model is of type {name}, and "
            "only gemma4, gemma4_unified and gemma4_text have assistants."
        )
    add_mixin(model, SharedKVMixin)


def _keys_and_values(entry: Any) -> tuple[mx.array, ...]:
    if isinstance(entry, RotatingKVCache):
        # A ring that is full begins with any of its tokens, not with the oldest.
        return entry._temporal_order(entry.keys), entry._temporal_order(entry.values)
    keys, values = entry.keys_and_values()
    if isinstance(entry, QuantizedKVCache):
        return tuple(
            mx.dequantize(*array, group_size=entry.group_size, bits=entry.bits)
            for array in (keys, values)
        )
    return keys, values
