"""Which ids of models are the served model by another name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "default_model"  # mlx-lm's own name for the model that it serves

# Clients for the vendors' services insist on the names of the vendors' models.
INVENTED = re.compile(r"(anthropic/)?(claude|gpt|chatgpt|codex|o[1-9])([-.][^/]*)?")


def is_invented(model: str) -> bool:
    """Whether a client made an id up that is no model anybody could load."""
    return INVENTED.fullmatch(model) is not None and not Path(model).exists()


def loadable_name(model: str | None, cli_args: Any, adapter: str | None = None) -> str:
    """The name under which mlx-lm is to look for a model.

    Args:
        model (str, optional): The id in a request.
        cli_args (Namespace): Of the server.
        adapter (str, optional): The folder of an adapter that the request names.
    """
    # One name for the served model, for mlx-lm batches requests of equal names only.
    names = (None, DEFAULT_MODEL, cli_args.model)
    if model not in names and not is_invented(str(model)):
        return str(model)
    # With its own name for the served model mlx-lm ignores the request's adapter.
    return DEFAULT_MODEL if adapter is None else cli_args.model or DEFAULT_MODEL
