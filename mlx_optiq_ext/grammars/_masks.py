"""Applies masks of tokens to logits, those of many rows in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

BITS = 32  # of a word


def masked(logits: mx.array, masks: Sequence[bytes | None]) -> mx.array:
    """Forbid tokens, whose logits become minus infinity.

    Args:
        logits (mx.array): Shape ``[..., vocab]``.
        masks (Sequence[bytes or None]): The allowed tokens of each row, as of
            ``Constraint.mask``; None for a row that stays as it is.
    """
    if all(mask is None for mask in masks):
        return logits
    vocab_size = logits.shape[-1]
    num_bytes = -(-vocab_size // BITS) * BITS // 8
    rows = b"".join(_fit(mask, num_bytes) for mask in masks)
    words = mx.array(memoryview(rows).cast("I")).reshape(*logits.shape[:-1], -1)
    return _apply(logits, words)


def _fit(mask: bytes | None, num_bytes: int) -> bytes:
    """A mask with as many bytes; models pad their vocabulary beyond its tokens."""
    if mask is None:
        return b"\xff" * num_bytes
    return mask[:num_bytes].ljust(num_bytes, b"\0")


@partial(mx.compile, shapeless=False)
def _apply(logits: mx.array, words: mx.array) -> mx.array:
    bits = words[..., None] >> mx.arange(BITS, dtype=mx.uint32)
    allowed = (bits & 1).astype(mx.bool_).reshape(*words.shape[:-1], -1)
    allowed = allowed[..., : logits.shape[-1]]
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
