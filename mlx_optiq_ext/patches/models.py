"""Wrapper for the recurrence of mlx-lm's Qwen3.5 models."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

Recorder = Callable[[Any, Any, Any], None]

# Called with the function and its arguments; set while a pass may be rolled back.
recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def gated_delta_update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (record := recorder.get()) is None:
        return wrapped(*args, **kwargs)
    record(wrapped, args, kwargs)
    return wrapped(*args, **kwargs)
