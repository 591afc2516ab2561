"""Wrappers for the recurrence and the attention of mlx-lm's models."""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx


def gated_delta_update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (record := _recorder().get()) is None:
        return wrapped(*args, **kwargs)
    return record(wrapped, args, kwargs)


@cache
def _recorder() -> ContextVar[Any]:
    """Import the recorder late, so that loading mlx-lm does not import our modules."""
    from ..rollback import recorder

    return recorder


def scaled_dot_product_attention(
    wrapped: Any, instance: Any, args: Any, kwargs: Any
) -> Any:
    keys = args[1] if len(args) > 1 else kwargs["keys"]
    # Keys of mlx-lm's own cache entries are arrays, or sequences if quantised.
    if isinstance(keys, (mx.array, tuple, list)):
        return wrapped(*args, **kwargs)
    return _attend(wrapped, *args, **kwargs)


def _attend(
    attention: Any,
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Let our keys attend; the parameters are those of mlx-lm's function."""
    return keys.attend(attention, queries, scale, mask, sinks)
