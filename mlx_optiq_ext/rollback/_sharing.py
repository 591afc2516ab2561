"""Cache entries of prompts that begin alike, which hold their rows once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache


def share_rows(entries: list[Any], longer: list[Any]) -> int:
    """Let entries look at the rows of others that hold the same tokens and more.

    Rows are never changed where they are: whoever goes on from them has copied them.
    States that are not made of rows, as recurrent ones, stay as they are.

    Args:
        entries (list): Of the shorter prompt; changed in place.
        longer (list): Of a prompt that begins with it.

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
    """Let entries hold their rows themselves again; changed in place."""
    arrays = []
    for entry in filter(_holds_rows, entries):
        entry.keys, entry.values = map(mx.contiguous, (entry.keys, entry.values))
        arrays += [entry.keys, entry.values]
    mx.eval(arrays)


def _holds_rows(entry: Any) -> bool:
    return type(entry) is KVCache and entry.keys is not None
