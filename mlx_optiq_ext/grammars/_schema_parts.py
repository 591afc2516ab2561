"""What a JSON schema says of one value, for formats other than JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._sources import Schema, full_match

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
MAX_DEPTH = 32  # of references to references


def resolved(schema: Any, root: Schema) -> Schema:
    """The schema that a reference means; {} for one that leads nowhere."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = _target(reference, root)
    return {}


def _target(reference: str, root: Schema) -> Any:
    target: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        target = target.get(name) if isinstance(target, dict) else None
    return target


def each_of(schema: Any, root: Schema) -> Iterator[Schema]:
    """The alternatives that a schema consists of, each of one type at most."""
    schema = resolved(schema, root)
    for keyword in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(keyword), list):
            rest = {key: x for key, x in schema.items() if key != keyword}
            for part in parts:
                yield from each_of({**rest, **resolved(part, root)}, root)
            return
    if isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
        yield from each_of(parts[0], root)
        return
    kinds = schema.get("type")
    if isinstance(kinds, list):
        yield from ({**schema, "type": kind} for kind in kinds)
    else:
        yield schema


def values_of(schema: Schema) -> list[Any] | None:
    """The values that a schema lists, None if it lists none."""
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


def may_be_text(schema: Schema) -> bool:
    """Whether a value may be a string."""
    return schema.get("type", "string") == "string"


def pattern_of(schema: Schema) -> str:
    """The regex of a string that a schema describes."""
    if isinstance(pattern := schema.get("pattern"), str):
        return full_match(pattern)
    most = schema.get("maxLength")
    return f"(?s:.{{{schema.get('minLength', 0)},{'' if most is None else most}}})"
