"""A wrapper for ``mlx_lm.utils`` that records where models are loaded from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from .._record import record_of


def load_model(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    model, config = wrapped(*args, **kwargs)
    # The path must outlive a change of the working folder. Links in it are not resolved
    # because they tell a snapshot in the Hub's cache.
    record_of(model).source = Path(call.arguments["model_path"]).absolute()
    return model, config
