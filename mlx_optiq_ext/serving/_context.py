"""How many tokens a model was made for."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .._record import record_of


def context_size(model: Any) -> int | None:
    """Positions that a model was made for, None if its configuration is not known."""
    source = record_of(model).source
    return None if source is None else _read_context(source / "config.json")


@functools.cache
def _read_context(path: Path) -> int | None:
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    return configured_context(config.get("text_config") or config)


def configured_context(config: dict[str, Any]) -> int | None:
    """Positions according to a configuration, stretched ones included."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") or 1
    original = scaling.get("original_max_position_embeddings") or 0
    size = max(config.get("max_position_embeddings") or 0, int(factor * original))
    return size or None
