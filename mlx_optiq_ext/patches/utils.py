"""Wrapper for ``mlx_lm.utils``: models remember where they came from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any


def load_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    model, config = wrapped(*args, **kwargs)
    model._mtp_source = Path(call.arguments["model_path"])
    return model, config
