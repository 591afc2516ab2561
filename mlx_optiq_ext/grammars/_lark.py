"""Writes grammars in Lark's words, as llguidance reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ._sources import Named, Schema, styled, together
from ._vocabulary import Vocabulary

EMPTY = '""'
SYNTAX = "\\/.+*?()|[]{}^$"  # of regexes, and of their place in a grammar


class LarkWriter:
    """Collects the rules of a grammar, and grammars that it refers to.

    Args:
        vocabulary (Vocabulary): The tokens that texts are made of.
        encode (Callable): Tokenises a text.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Any):
        self._vocabulary = vocabulary
        self._encode = encode
        self._rules: list[str] = []
        self._parts: list[Named] = []
        self._num_names = 0

    def text(self, start: str) -> str:
        """The grammar with all rules.

        Args:
            start (str): What a text consists of.
        """
        return together("\n".join([f"start: {start}", *self._rules]), self._parts)

    def rule(self, expression: str, name: str = "") -> str:
        """Add a rule; its name."""
        name = name or self.new_name("r")
        self._rules.append(f"{name}: {expression}")
        return name

    def new_name(self, prefix: str) -> str:
        """A name that no other rule has."""
        self._num_names += 1
        return f"{prefix}{self._num_names}"

    def json_value(self, schema: Schema, root: Schema, is_strict: bool) -> str:
        """A value that a JSON schema describes, written as JSON.

        Args:
            schema (dict): The schema.
            root (dict): The schema that it is a part of, which has the definitions.
            is_strict (bool): As of ``Source``.
        """
        parts = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return self.add({"json_schema": styled({**parts, **schema}, is_strict)})

    def add(self, grammar: Named) -> str:
        """Add a grammar; how a rule refers to it."""
        name = self.new_name("g")
        self._parts.append({**grammar, "name": name})
        return f"@{name}"

    def marker(self, text: str) -> str:
        """A marker of a template, which may be made of special tokens."""
        if not self._is_special(text):
            return literal(text)
        return " ".join(f"<[{token}]>" for token in self._encode(text))

    def text_until(self, end: str, pattern: str) -> str:
        """A text that a regex matches, and what ends it where it first occurs.

        Args:
            end (str): The end, which may be a marker.
            pattern (str): The regex.
        """
        if self._is_special(end):
            # No text has special tokens.
            return f"{self.rule(f'/{pattern}/', self.new_name('T'))} {self.marker(end)}"
        name = self.new_name("t")
        self._rules.append(f"{name}[lazy]: /{pattern}{escaped(end)}/")
        return name

    def _is_special(self, text: str) -> bool:
        tokens = self._encode(text)
        is_special = self._vocabulary.tokenizer.is_special_token
        return len(tokens) > 0 and all(map(is_special, tokens))


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def alternatives(expressions: Iterable[str]) -> str:
    """One of some expressions."""
    return f"({' | '.join(dict.fromkeys(expressions))})"


def escaped(text: str) -> str:
    """A regex for a text as it is."""
    text = "".join(f"\\{c}" if c in SYNTAX else c for c in text)
    return text.replace("\n", "\\n")


def members(
    writer: LarkWriter, items: Mapping[str, str], required: Iterable[str]
) -> str:
    """Items with commas between them, of which some may be left out.

    Args:
        writer (LarkWriter): Gets the rules.
        items (Mapping[str, str]): The expression of each, by its name and in order.
        required (Iterable[str]): The names of those that have to be there.
    """
    needed = set(required)
    # What may follow once there is an item, and what while there is none.
    after, first = EMPTY, EMPTY
    for name, item in reversed(list(items.items())):
        further, alone = f'"," {item} {after}', f"{item} {after}"
        if name not in needed:
            further, alone = f"({further} | {after})", f"({alone} | {first})"
        after, first = writer.rule(further), writer.rule(alone)
    return first
