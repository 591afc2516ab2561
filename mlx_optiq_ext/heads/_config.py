"""Reads the parts of a ``config.json`` that may be anything, as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object that a configuration has under a name.

    Args:
        config (Mapping[str, Any]): The configuration.
        name (str): The name of the object.

    Returns:
        dict: The object. It is empty if there is none, and if there is something else
        in its place: where a head is and how it is quantised can be seen without it.
    """
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the model that reads text."""
    return block(config, "text_config") or config
