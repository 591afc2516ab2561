"""Wrappers for recurrences and attention of mlx-lm's models."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx


def gated_delta_update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (record := _recorder().get()) is None:
        return wrapped(*args, **kwargs)
    record(wrapped, args, kwargs)
    return wrapped(*args, **kwargs)


def ssm_update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if args[0].shape[1] == 1 or not _rows_are_apart().get():
        return wrapped(*args, **kwargs)
    from ..rollback import update_in_order

    return update_in_order(wrapped, *args, **kwargs)


def latent_attention(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if args[0].shape[1] == 1 or not _rows_are_apart().get():
        return wrapped(*args, **kwargs)
    from ..rollback import attend_apart

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    return attend_apart(wrapped, **call.arguments)


@cache
def _rows_are_apart() -> ContextVar[bool]:
    from ..rollback import rows_are_apart

    return rows_are_apart


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
