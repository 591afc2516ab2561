"""Values as Gemma-4 writes them: bare keys, and strings in quotes of its own."""

from __future__ import annotations

import json
from typing import Any

from ._lark import LarkWriter, alternatives, literal, members
from ._schema_parts import TYPES, each_of, pattern_of, values_of
from ._sources import Schema

QUOTE = '<|"|>'
KEY = "/[A-Za-z_][A-Za-z0-9_-]*/"


class GemmaValues:
    """Writes the rules for the values of one tool's arguments.

    Args:
        writer (LarkWriter): Gets the rules.
        root (dict): The schema of the arguments.
        is_strict (bool): As of ``Source``.
    """

    def __init__(self, writer: LarkWriter, root: Schema, is_strict: bool):
        self._writer = writer
        self._root = root
        self._is_strict = is_strict
        self._quote = writer.marker(QUOTE)
        # A schema may contain itself, so that rules are found again.
        self._known: dict[str, str] = {}

    def value(self, schema: Any) -> str:
        """The name of the rule for a value."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._known:
            name = self._known[key] = self._writer.new_name("v")
            parts = [self._one(part) for part in each_of(schema, self._root)]
            self._writer.rule(alternatives(parts), name)
        return self._known[key]

    def _one(self, schema: Schema) -> str:
        if (values := values_of(schema)) is not None:
            return alternatives(map(self._literal, values))
        kind = schema.get("type")
        if kind == "string":
            text = self._writer.text_until(QUOTE, pattern_of(schema))
            return f"{self._quote} {text}"
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema)
        if kind == "array":
            return self._array(schema)
        if kind in TYPES:
            return self._writer.json_value(schema, self._root, self._is_strict)
        return alternatives(self.value({"type": kind}) for kind in TYPES)

    def _object(self, schema: Schema) -> str:
        properties = schema.get("properties") or {}
        if not properties:
            other = schema.get("additionalProperties", {})
            pair = f'{KEY} ":" {self.value(other if isinstance(other, dict) else {})}'
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        # The template sorts them.
        items = {
            name: f"{literal(f'{name}:')} {self.value(properties[name])}"
            for name in sorted(properties)
        }
        return f'"{{" {members(self._writer, items, schema.get("required") or ())} "}}"'

    def _array(self, schema: Schema) -> str:
        item = self.value(schema.get("items") or {})
        least, most = schema.get("minItems") or 0, schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        further = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){further}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _literal(self, value: Any) -> str:
        """A value that is given, in Gemma's words."""
        if isinstance(value, str):
            return f"{self._quote} {literal(value)} {self._quote}"
        if isinstance(value, list):
            return f'"[" {self._joined([self._literal(x) for x in value])} "]"'
        if isinstance(value, dict):
            pairs = [
                f"{literal(f'{name}:')} {self._literal(value[name])}"
                for name in sorted(value)
            ]
            return f'"{{" {self._joined(pairs)} "}}"'
        return literal(json.dumps(value))

    def _joined(self, parts: list[str]) -> str:
        return ' "," '.join(parts) or '""'
