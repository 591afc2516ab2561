"""Arguments as Qwen3.5 writes them: ``<parameter=x>``, and strings without quotes."""

from __future__ import annotations

from typing import Any

from ._lark import EMPTY, LarkWriter, alternatives, literal
from ._schema_parts import each_of, may_be_text, pattern_of, resolved, values_of
from ._sources import Schema

END = "\n</parameter>\n"


class XMLValues:
    """Writes the rules for the arguments of one tool.

    Args:
        writer (LarkWriter): Gets the rules.
        root (dict): The schema of the arguments.
        is_strict (bool): As of ``Source``.
    """

    def __init__(self, writer: LarkWriter, root: Schema, is_strict: bool):
        self._writer = writer
        self._root = root
        self._is_strict = is_strict

    def arguments(self) -> str:
        """All arguments, in the order in which they are declared."""
        schema = resolved(self._root, self._root)
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        elements = [
            self._element(name, part, name in required)
            for name, part in properties.items()
        ]
        return " ".join(elements) or EMPTY

    def _element(self, name: str, schema: Any, is_required: bool) -> str:
        start = literal(f"<parameter={name}>\n")
        value = alternatives(self._value(part) for part in each_of(schema, self._root))
        rule = self._writer.rule(f"{start} {value}")
        return rule if is_required else f"{rule}?"

    def _value(self, schema: Schema) -> str:
        """A value, and what ends it."""
        values = values_of(schema)
        if values is not None and all(isinstance(value, str) for value in values):
            return f"{alternatives(map(literal, values))} {literal(END)}"
        if values is not None or not may_be_text(schema):
            value = self._writer.json_value(schema, self._root, self._is_strict)
            return f"{value} {literal(END)}"
        return self._writer.text_until(END, pattern_of(schema))
