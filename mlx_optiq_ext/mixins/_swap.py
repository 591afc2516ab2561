"""Giving one model of a class what others of it do not get."""

from __future__ import annotations

from functools import cache

import mlx.nn as nn


def add_mixin(model: nn.Module, mixin: type) -> None:
    """Make a model an instance of its class with a mixin; nothing else changes."""
    if not isinstance(model, mixin):
        model_class: type = type(model)
        model.__class__ = _mixed(mixin, model_class)


@cache
def _mixed(mixin: type, model_class: type) -> type:
    """The subclass, which looks like the class itself."""
    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (mixin, model_class), names)
