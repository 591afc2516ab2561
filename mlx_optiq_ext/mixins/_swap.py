"""Giving one model of a class what others of it do not get."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.nn as nn


def add_mixin(model: nn.Module, mixin: type) -> None:
    """Make a model an instance of its class with a mixin; nothing else changes.

    Copies of the model, and what unpickling makes of it, have the class itself.
    """
    if not isinstance(model, mixin):
        model_class: type = type(model)
        model.__class__ = _mixed(mixin, model_class)


@cache
def _mixed(mixin: type, model_class: type) -> type:
    """The subclass, which looks like the class itself."""
    names = {
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "__reduce_ex__": _reduce_to_original,
        "_original_class": getattr(model_class, "_original_class", model_class),
    }
    return type(model_class.__name__, (mixin, model_class), names)


def _reduce_to_original(model: Any, protocol: Any) -> tuple[Any, ...]:
    """What the original class reduces to: pickle would not find another one."""
    reduced: Any = nn.Module.__reduce_ex__(model, protocol)
    return _new, (model._original_class,), *reduced[2:]


def _new(model_class: Any) -> Any:
    # Not copyreg.__newobj__: pickle refuses that for another class than the object's.
    return model_class.__new__(model_class)
