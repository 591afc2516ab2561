"""Adds a mixin to one model without changing its class for other models."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.nn as nn


def add_mixin(model: nn.Module, mixin: type) -> None:
    """Make a model an instance of its class with a mixin; nothing else changes.

    Copied and unpickled models have the original class again.

    Args:
        model (nn.Module): The model, which is changed in place.
        mixin (type): The class to put before the model's own.
    """
    if not isinstance(model, mixin):
        model_class: type = type(model)
        model.__class__ = _mixed(mixin, model_class)


@cache
def _mixed(mixin: type, model_class: type) -> type:
    """Make the subclass with the mixin, which has the name of the original class."""
    names = {
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "__reduce_ex__": _reduce_to_original,
        "_original_class": getattr(model_class, "_original_class", model_class),
    }
    return type(model_class.__name__, (mixin, model_class), names)


def _reduce_to_original(model: Any, protocol: Any) -> tuple[Any, ...]:
    """Reduce a model to its original class, the only one that pickle can find."""
    reduced: Any = nn.Module.__reduce_ex__(model, protocol)
    return _new, (model._original_class,), *reduced[2:]


def _new(model_class: Any) -> Any:
    # Pickle refuses copyreg.__newobj__ for a class that is not the object's own.
    return model_class.__new__(model_class)
