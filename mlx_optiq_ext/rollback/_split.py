"""Attention of wide passes in parts that Metal's kernel for few queries takes.

That kernel takes at most 8 rows, and 32 rows times query heads to a key head. One row
more, and the scores of all rows are written to memory, in another order of sums than
that of single rows. So a wider pass attends in parts, each over the keys that its rows
see. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

HEAD_DIMS = {64, 96, 128, 192, 256}
MAX_ROWS = 8
MAX_QUERIES = 32  # of all query heads that share a key head

# Whether a pass of speculation is being built on a device with the kernel.
splits_attention: ContextVar[bool] = ContextVar("splits_attention", default=False)


@contextmanager
def splitting() -> Iterator[None]:
    """Until the end of the context, wide passes attend in parts, where that pays."""
    has_kernel = mx.metal.is_available() and mx.default_device() == mx.gpu
    token = splits_attention.set(has_kernel)
    try:
        yield
    finally:
        splits_attention.reset(token)


def attend_in_parts(
    attention: Callable[..., mx.array],
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend in parts that the kernel takes; the parameters are those of mlx-lm.

    Args:
        attention (Callable): mlx-lm's ``scaled_dot_product_attention``.
    """
    options = {"cache": cache, "scale": scale, "sinks": sinks}
    num_rows, most = queries.shape[2], _most_rows(queries, keys)
    if num_rows <= most:
        return attention(queries, keys, values, mask=mask, **options)
    outputs = []
    for start in range(0, num_rows, most):
        end = min(start + most, num_rows)
        # Rows are causal from the lower right, so the last part sees all keys.
        num_unseen = num_rows - end if isinstance(mask, str) else 0
        seen = slice(0, keys.shape[2] - num_unseen)
        output = attention(
            queries[:, :, start:end],
            keys[:, :, seen],
            values[:, :, seen],
            mask=_part_of(mask, start, end),
            **options,
        )
        outputs.append(output)
    return mx.concatenate(outputs, axis=2)


def _most_rows(queries: mx.array, keys: mx.array) -> int:
    """The most rows that a part may have."""
    num_rows, head_dim = queries.shape[2:]
    num_sharing = queries.shape[1] // keys.shape[1]
    if head_dim not in HEAD_DIMS or num_sharing > MAX_QUERIES:
        return num_rows
    return min(MAX_ROWS, MAX_QUERIES // num_sharing)


def _part_of(mask: Any, start: int, end: int) -> Any:
    """What some rows of a pass see."""
    if isinstance(mask, str):
        return mask if end - start > 1 else None
    is_for_each = mask is not None and mask.ndim > 1 and mask.shape[-2] > 1
    return mask[..., start:end, :] if is_for_each else mask
