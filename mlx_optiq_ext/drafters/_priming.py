"""A model whose calls keep its MTP head primed, also in batches.

Where several sequences are decoded at once, and while a batch of prompts is processed,
no draft session looks on. Here the model itself shows the head every token that it is
called with, if its prompt cache ends with the entries of the head.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache

from ..mixins import MTPMixin, add_mixin
from ._mtp import NUM_TOKENS, STATE, MTPDrafter, show
from ._protocol import Drafter


class PrimingMixin(MTPMixin):
    """A model with its head attached, which primes the head when it is called."""

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """As the model itself."""
        states = self.hidden_states(inputs, cache, input_embeddings)
        own = [] if cache is None else cache[self.num_entries :]
        if own:
            embeddings = (
                self.embed(inputs) if input_embeddings is None else input_embeddings
            )
            kv_cache, arrays = own
            _prime(self, kv_cache, arrays, embeddings, states)
            # Nothing else asks for what the head keeps: without this, a batch that
            # decodes for long would put all of it off to its end.
            if kv_cache.keys is not None:
                states = mx.depends(states, [kv_cache.keys, kv_cache.values])
        return self.project(states)


def keep_primed(drafter: Drafter, model: nn.Module) -> None:
    """Let a drafter follow what a model is called with where no session looks on.

    Args:
        drafter (Drafter): Of any kind; an MTP head is the one that has to.
        model (nn.Module): Its target, with the head attached.
    """
    if isinstance(drafter, MTPDrafter):
        add_mixin(model, PrimingMixin)


def _prime(
    model: MTPMixin,
    kv_cache: KVCache | BatchKVCache,
    arrays: ArraysCache,
    embeddings: mx.array,
    states: mx.array,
) -> None:
    """Show the head tokens with the states before them, all ``[batch, rows, hidden]``.

    The first token of a sequence has no state before it. Its row is computed all the
    same and counts as padding, so that every sequence of a batch gets the same rows.
    """
    if not isinstance(kv_cache, BatchKVCache):
        _prime_one(model, kv_cache, arrays, embeddings, states)
        return
    num_sequences, num_rows = embeddings.shape[:2]
    num_tokens = arrays[NUM_TOKENS]
    if num_tokens is None:
        num_tokens = mx.zeros((num_sequences, 1), mx.int32)
        arrays[STATE] = mx.zeros_like(states[:, :1])
    num_valid = mx.full(num_sequences, num_rows)
    if arrays.lengths is not None:
        num_valid = mx.clip(arrays.lengths, 0, num_rows)
    is_first = ((num_tokens[:, 0] == 0) & (num_valid > 0)).astype(mx.int32)
    kv_cache.left_padding = kv_cache.left_padding + is_first
    kv_cache.offset = kv_cache.offset - is_first
    known = mx.concatenate([arrays[STATE], states], axis=1)
    model.mtp(embeddings, known[:, :-1], cache=kv_cache)
    arrays[STATE] = mx.take_along_axis(known, num_valid[:, None, None], axis=1)
    arrays[NUM_TOKENS] = num_tokens + num_valid[:, None]
    arrays.advance(num_rows)


def _prime_one(
    model: MTPMixin,
    kv_cache: KVCache,
    arrays: ArraysCache,
    embeddings: mx.array,
    states: mx.array,
) -> None:
    show(model, kv_cache, arrays, embeddings, states)
    num_rows, num_tokens = mx.array([[states.shape[1]]]), arrays[NUM_TOKENS]
    arrays[NUM_TOKENS] = num_rows if num_tokens is None else num_tokens + num_rows
