"""llguidance, which the extra ``structured`` brings."""

from __future__ import annotations

import importlib
from typing import Any

NAME = "llguidance"
MISSING = (
    "Structured output needs llguidance, which is not installed: "
    "pip install 'mlx-optiq-ext[structured]'"
)


def library(module: str = NAME) -> Any:
    """Import llguidance, or one of its modules.

    Args:
        module (str): The name of the module.

    Raises:
        ImportError: If it is not installed; the message names the extra, and ``name``
          is that of the library.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(MISSING, name=NAME) from error
