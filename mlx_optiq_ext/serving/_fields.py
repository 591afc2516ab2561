"""Reads fields of a request; what has the wrong type is an error that names it."""

from __future__ import annotations

import math
from typing import Any

from ._errors import APIError, bad_request

NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "an array",
}

Kind = type | tuple[type, ...]


def optional(
    source: dict[str, Any], name: str, kind: Kind, default: Any = None, path: str = ""
) -> Any:
    """The value of a field, or the default if it is absent or null.

    Raises:
        APIError: 400, if the value is not of that kind.
    """
    value = source.get(name)
    if value is None:
        return default
    return checked(value, kind, path + name)


def required(source: dict[str, Any], name: str, kind: Kind, path: str = "") -> Any:
    """The value of a field.

    Raises:
        APIError: 400, if it is absent or not of that kind.
    """
    value = optional(source, name, kind, path=path)
    if value is None:
        raise missing(path + name)
    return value


def missing(path: str) -> APIError:
    return bad_request(f"{path}: Field required", param=path)


def checked(value: Any, kind: Kind, path: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not any(_is_kind(value, kind) for kind in kinds):
        expected = " or ".join(NAMES[kind] for kind in kinds)
        raise bad_request(
            f"{path}: expected {expected}, got {describe(value)}", param=path
        )
    return value


def number(
    source: dict[str, Any],
    name: str,
    default: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    kind: type = float,
) -> Any:
    """The value of a numeric field.

    Raises:
        APIError: 400, if it is not such a number or outside ``[least, most]``.
    """
    value = optional(source, name, kind)
    if value is None:
        return default
    if not least <= value <= most:
        raise bad_request(
            f"{name}: {value} is not between {least} and {most}", param=name
        )
    return value


def choice(value: str, allowed: tuple[str, ...], path: str) -> str:
    if value not in allowed:
        names = ", ".join(allowed)
        raise bad_request(f"{path}: {value!r} is not one of {names}", param=path)
    return value


def objects(values: list[Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of an array, each with its path."""
    return [
        (f"{path}.{index}", checked(value, dict, f"{path}.{index}"))
        for index, value in enumerate(values)
    ]


def describe(value: Any) -> str:
    if value is None:
        return "null"
    return NAMES.get(type(value), type(value).__name__)


def _is_kind(value: Any, kind: type) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)
