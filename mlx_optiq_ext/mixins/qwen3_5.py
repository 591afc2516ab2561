"""Attaches MTP heads to Qwen3.5 models of mlx-lm, with the methods to draft by them."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.utils import get_total_parameters

from .._errors import SpeculationError
from .._options import check_mtp_bits
from .._record import record_of
from ..heads import (
    Host,
    MTPHead,
    Params,
    check_type,
    dtype_of_states,
    load_head,
    quantization_of,
    quantize_head,
)
from ._swap import add_mixin

# The limit is below 4e9 because models called 4B have a little more or less.
_MIN_NUM_PARAMETERS = 3.5e9


class MTPMixin:
    """A Qwen3.5 model with its MTP head attached."""

    language_model: Any

    @property
    def mtp(self) -> MTPHead:
        """The attached head."""
        return record_of(self).head

    @property
    def num_entries(self) -> int:
        """The number of prompt cache entries of the model, without the head's."""
        return len(self.language_model.layers)

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
              tokens' own, ``[batch, num_tokens, hidden_size]``.
        """
        return self.language_model.model(
            inputs, cache, input_embeddings=input_embeddings
        )

    @property
    def output_layer(self) -> nn.Module:
        """The layer that projects states to logits, or the embedding if it is tied."""
        if self.language_model.args.tie_word_embeddings:
            return self.language_model.model.embed_tokens
        return self.language_model.lm_head

    def project(self, hidden: mx.array) -> mx.array:
        """Project states of the model or its head to logits.

        Args:
            hidden (mx.array): Hidden states, ``[batch, num_tokens, hidden_size]``.

        Returns:
            mx.array: Logits, ``[batch, num_tokens, vocab_size]``.
        """
        if self.language_model.args.tie_word_embeddings:
            return self.output_layer.as_linear(hidden)
        return self.output_layer(hidden)

    def embed(self, tokens: mx.array) -> mx.array:
        """Look up the embeddings of tokens, ``[..., hidden_size]``.

        Args:
            tokens (mx.array): Tokens, in an array of any shape.
        """
        return self.language_model.model.embed_tokens(tokens)

    def make_mtp_cache(self) -> list[Any]:
        """Make the cache entries that the head needs for a sequence.

        Returns:
            list: The head's KV cache, then an entry for the last state,
            ``[1, 1, hidden_size]``, and the number of tokens seen, ``[1, 1]``.
        """
        return [KVCache(), ArraysCache(2)]


def attach_mtp(
    model: nn.Module,
    source: str | Path | None = None,
    mtp_bits: int | None = None,
) -> MTPHead:
    """Attach the MTP head of a model, and load it unless it is attached already.

    Parameters and modules of the model stay as they are.

    Args:
        model (nn.Module): A model that mlx-lm loaded.
        source (str or Path, optional): A folder, ``.safetensors`` file or Hub id with
          the head. Default: where the model came from.
        mtp_bits (int, optional): Bits that the linear layers of a head are quantised
          with that is stored in full; 0 keeps it as it is. Default: those of the model.

    Raises:
        ValueError: If MLX has no kernels for so many bits.
        SpeculationError: If the model has no head or cannot have one.
    """
    if mtp_bits is not None:
        check_mtp_bits(mtp_bits)
    check_type(model)
    place = _place(model, source)
    record = record_of(model)
    if (record.head_source, record.head_bits) == (place, mtp_bits):
        return record.head
    _check_is_whole(model)
    head = load_head(place, model.language_model.args, dtype_of_states(model))
    params = None
    if not quantization_of(head.layers[0]):
        params = _wanted_params(model, mtp_bits)
        mx.eval(quantize_head(head, params).parameters())
    record.head, record.head_source, record.head_bits = head, place, mtp_bits
    record.is_head_quantized = params is not None
    add_mixin(model, MTPMixin)
    if get_total_parameters(model) < _MIN_NUM_PARAMETERS:
        _warn_of_small_model()
    return head


def _wanted_params(model: nn.Module, mtp_bits: int | None) -> Params | None:
    """What a head in full is to be quantised with, None if it stays as it is."""
    params = Host.of(model).quantization
    if mtp_bits is None:
        return params
    if mtp_bits == 0:
        return None
    is_affine = params is not None and params["mode"] == "affine"
    group_size = params["group_size"] if params and is_affine else 64
    return {"group_size": group_size, "bits": mtp_bits, "mode": "affine"}


def _check_is_whole(model: nn.Module) -> None:
    groups = [
        getattr(module, "sharding_group", None)
        for module in model.language_model.modules()
    ]
    if model.language_model.model.pipeline_size > 1 or any(groups):
        raise SpeculationError(
            "Cannot speculate with an MTP head: the model is distributed over several "
            "processes. Run it in one, or without --mtp."
        )


def _place(model: nn.Module, source: str | Path | None) -> str:
    if source is None:
        source = record_of(model).source
    if source is None:
        raise SpeculationError(
            "Cannot speculate with an MTP head: it is not known where the model came "
            'from, as mlx_lm.load did not load it. Name the place with mtp="PATH".'
        )
    path = Path(source).expanduser()
    # A snapshot is recognised by its path, so links in the path are not resolved.
    return str(path.absolute()) if path.exists() else str(source)


@cache
def _warn_of_small_model() -> None:
    warnings.warn(
        "Speculation with an MTP head is not expected to pay for a model of less than "
        "about 4B parameters: a draft costs much of what it can save.",
        stacklevel=3,
    )
