"""Lets cache entries of prompts that begin alike hold their common rows only once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache


def share_rows(entries: list[Any], longer: list[Any]) -> int:
    """Let entries refer to the rows of others that hold the same tokens and more.

    This is safe because stored rows are never changed in place: a sequence that
    continues from them works on a copy. States that are not made of rows, such as
    recurrent states, stay as they are.

    Args:
        entries (list): The entries of the shorter prompt, which are changed in place.
        longer (list): The entries of a prompt that begins with the shorter one.

    Returns:
        int: The number of bytes that the entries do not hold themselves any more.
    """
    num_bytes = 0
    for entry, other in zip(entries, longer, strict=False):
        if _holds_rows(entry) and _holds_rows(other) and entry.offset <= other.offset:
            num_bytes += entry.nbytes
            entry.keys = other.keys[..., : entry.offset, :]
            entry.values = other.values[..., : entry.offset, :]
    return num_bytes


def own_rows(entries: list[Any]) -> None:
    """Let entries hold their rows themselves again.

    Args:
        entries (list): Entries that ``share_rows`` changed; they are changed in place.
    """
    arrays = []
    for entry in filter(_holds_rows, entries):
        entry.keys, entry.values = map(mx.contiguous, (entry.keys, entry.values))
        arrays += [entry.keys, entry.values]
    mx.eval(arrays)


def _holds_rows(entry: Any) -> bool:
    return type(entry) is KVCache and entry.keys is not None
