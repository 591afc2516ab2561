"""Wraps functions of mlx-lm, its seams, and switches the wrappers on and off."""

from __future__ import annotations

import importlib

from .. import _bootstrap
from .._errors import SpeculationError
from . import _table
from ._applier import Applier
from ._table import Patch
from ._versions import SUPPORTED, unsupported_reason

__all__ = [
    "SUPPORTED",
    "applied",
    "apply",
    "disable",
    "enable",
    "is_enabled",
    "problem",
    "target_modules",
]

_applier = Applier()


def apply() -> None:
    """Patch mlx-lm, or warn once and leave it as it is if that cannot be done."""
    _applier.apply(_table.PATCHES, unsupported_reason())


def enable() -> None:
    """Import mlx-lm and patch it, or turn the patches on again.

    Raises:
        SpeculationError: If mlx-lm is not a supported release, lacks a seam that
          is patched, or ``MLX_OPTIQ_EXT=0`` is set.
    """
    if _bootstrap.switched_off():
        raise SpeculationError(
            "cannot patch mlx-lm: MLX_OPTIQ_EXT=0 is set in the environment, unset it"
        )
    _applier.warns = False
    try:
        apply()
        importlib.import_module("mlx_lm")
    finally:
        _applier.warns = True
    if _applier.problem is not None:
        raise SpeculationError(f"cannot patch mlx-lm: {_applier.problem}")
    _applier.enabled = True


def disable() -> None:
    """Make mlx-lm behave as if this package were not installed."""
    _applier.enabled = False


def is_enabled() -> bool:
    """Tell whether mlx-lm is patched, or will be when it is imported."""
    return (
        _applier.enabled
        and _applier.problem is None
        and not _bootstrap.switched_off()
        and unsupported_reason() is None
    )


def applied() -> tuple[Patch, ...]:
    """List the patches that are in place in this process."""
    return _applier.applied


def problem() -> str | None:
    """Say why nothing is patched in this process; None means that it can be."""
    return _applier.problem


def target_modules() -> list[str]:
    """List the modules of mlx-lm that the patch table names, each once."""
    return list(dict.fromkeys(row.module for row in _table.PATCHES))
