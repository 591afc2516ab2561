"""llguidance, which the extra ``structured`` brings."""

from __future__ import annotations

import importlib
from typing import Any

MISSING = (
    "Structured output needs llguidance, which is not installed: "
    "pip install 'mlx-optiq-ext[structured]'"
)


def library(name: str = "llguidance") -> Any:
    """Import llguidance, or one of its modules.

    Args:
        name (str): The name of the module.

    Raises:
        ImportError: If it is not installed, with the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(MISSING) from error
