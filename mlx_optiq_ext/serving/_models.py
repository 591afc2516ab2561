"""Which models there are, and which ids are the served model by another name."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import CacheNotFound
from mlx_lm import server

from ._errors import APIError

DEFAULT_MODEL = "default_model"  # mlx-lm's own name for the model that it serves

# Clients for the vendors' services insist on the names of the vendors' models.
INVENTED = re.compile(r"(anthropic/)?(claude|gpt|chatgpt|codex|o[1-9])([-.][^/]*)?")

# By which mlx-lm tells a model that it can serve from other downloads.
FILES = {"config.json", "model.safetensors.index.json", "tokenizer_config.json"}


def is_invented(model: str) -> bool:
    """Whether a client made an id up that is no model anybody could load."""
    return INVENTED.fullmatch(model) is not None and not Path(model).exists()


def loadable_name(model: str | None, cli_args: Any, adapter: str | None = None) -> str:
    """The name under which mlx-lm is to look for a model.

    Args:
        model (str, optional): The id in a request.
        cli_args (Namespace): The server's command line.
        adapter (str, optional): The folder of an adapter that the request names.
    """
    # One name for the served model, for mlx-lm batches requests of equal names only.
    names = (None, DEFAULT_MODEL, cli_args.model)
    if model not in names and not is_invented(str(model)):
        return str(model)
    # With its own name for the served model mlx-lm ignores the request's adapter.
    return DEFAULT_MODEL if adapter is None else cli_args.model or DEFAULT_MODEL


def model_list(cli_args: Any, created: int) -> dict[str, Any]:
    """The models that can be asked for, as both vendors list theirs."""
    models = [model_entry(name, created) for name in _known_names(cli_args)]
    ids = [model["id"] for model in models] or [None]
    return {
        "object": "list",
        "data": models,
        "first_id": ids[0],
        "last_id": ids[-1],
        "has_more": False,
    }


def find_model(model: str, cli_args: Any, created: int) -> dict[str, Any]:
    """One model, by any of its names.

    Raises:
        APIError: 404, if it is neither served nor in the download cache.
    """
    is_served = cli_args.model and loadable_name(model, cli_args) == DEFAULT_MODEL
    if not is_served and model not in _known_names(cli_args):
        raise APIError(
            404, f"The model {model!r} does not exist", code="model_not_found"
        )
    return model_entry(model, created)


def model_entry(model: str, created: int) -> dict[str, Any]:
    """What is said of a model: OpenAI's fields, and Anthropic's."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "mlx-lm",
        "type": "model",
        "display_name": model,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
    }


def _known_names(cli_args: Any) -> list[str]:
    """The ids of the models in the download cache, and the path of the served one."""
    try:
        repos = server.scan_cache_dir().repos
    except CacheNotFound:
        # Whoever never downloaded a model has no such folder.
        repos = frozenset()
    names = sorted(repo.repo_id for repo in repos if _is_model(repo))
    path = Path(cli_args.model) if cli_args.model else None
    return [*names, str(path.resolve())] if path and path.exists() else names


def _is_model(repo: Any) -> bool:
    if repo.repo_type != "model" or "main" not in repo.refs:
        return False
    return {file.file_path.name for file in repo.refs["main"].files} >= FILES
