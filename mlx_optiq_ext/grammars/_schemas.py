"""Finds out where in a JSON schema an error is, which llguidance does not say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

MAX_SECONDS = 2.0  # to look for it; then the part found so far has to do

# Keywords by what they have: one schema, a list of some, or an object with some.
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
OBJECTS = ("properties", "patternProperties", "$defs", "definitions")

Compile = Callable[[Any], str]
Place = tuple[str, Any]


def place_of_error(schema: Any, compile_schema: Compile) -> str:
    """The innermost part of a schema that has an error of the whole.

    Args:
        schema (Any): The schema.
        compile_schema (Callable): Compiles one, and says what is wrong with it if
            something is.
    """
    definitions = {
        key: schema[key] for key in ("$defs", "definitions") if key in schema
    }
    error, path = compile_schema(schema), ""
    deadline = time.monotonic() + MAX_SECONDS

    def has_error(part: Any) -> bool:
        if not isinstance(part, dict) or time.monotonic() > deadline:
            return False
        return compile_schema({**part, **definitions}) == error

    # Definitions have their errors in whatever part they are compiled with.
    for place, part in _parts({key: definitions[key] for key in definitions}):
        if isinstance(part, dict) and compile_schema(part) == error:
            schema, path, definitions = part, place, {}
            break
    while found := next((x for x in _parts(schema) if has_error(x[1])), None):
        path, schema = f"{path}.{found[0]}" if path else found[0], found[1]
    return path


def _parts(schema: Any) -> Iterator[Place]:
    """The schemas that a schema directly consists of, with their paths."""
    if not isinstance(schema, dict):
        return
    for key in ONE:
        if isinstance(schema.get(key), dict):
            yield key, schema[key]
    for key in LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}.{i}", part) for i, part in enumerate(schema[key]))
    for key in OBJECTS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}.{name}", x) for name, x in schema[key].items())
