"""Grammars as users write them, turned into those of llguidance.

A grammar of llguidance is a list of named ones, which may refer to each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .._errors import GrammarError
from ._library import library

MAX_SIZE = 1 << 20  # characters of a grammar

Kind = Literal["json_schema", "regex", "grammar"]
Named = dict[str, Any]
Schema = dict[str, Any]

# White space as `json.dumps` writes it, which models write of their own accord. Without
# a choice the grammar has one way to go more often, and a model cannot write nothing
# but white space.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
LENIENT = {"lenient": True, "coerce_one_of": True}


@dataclass(frozen=True)
class Source:
    """A grammar as a user gave it.

    Args:
        kind (str): "json_schema", "regex" or "grammar", which is in Lark's words or in
            those of GBNF.
        content (Any): A JSON schema as an object or a boolean, otherwise a text.
        is_strict (bool): Whether a JSON schema with a keyword that cannot be enforced
            is an error; otherwise the keyword is ignored.
    """

    kind: Kind
    content: Any
    is_strict: bool = True

    def named(self, name: str) -> Named:
        """The grammar of llguidance, by a name of its own.

        Raises:
            GrammarError: If this cannot be a grammar.
        """
        if self.kind == "json_schema":
            return {"name": name, "json_schema": styled(self.content, self.is_strict)}
        if not isinstance(self.content, str):
            raise GrammarError(f"expected a text, got {self.content!r:.80}")
        check_size(self.content)
        if self.kind == "regex":
            return {"name": name, "lark_grammar": _lark_of_regex(self.content)}
        return {"name": name, "lark_grammar": _lark(self.content)}


ANY_OBJECT = Source("json_schema", {"type": "object"})


def styled(schema: Any, is_strict: bool) -> Any:
    """A JSON schema with how its values are to be written.

    Raises:
        GrammarError: If it is none, or too large.
    """
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"expected an object, got {schema!r:.80}")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from error
    check_size(text)
    if schema is False:
        raise GrammarError("no value satisfies the schema false")
    if schema is True:
        schema = {}
    style = JSON_STYLE if is_strict else JSON_STYLE | LENIENT
    own = schema.get("x-guidance")
    return schema | {"x-guidance": style | (own if isinstance(own, dict) else {})}


def check_size(text: str) -> None:
    """Refuse what would take long to read.

    Raises:
        GrammarError: If it has more than a million characters.
    """
    if len(text) > MAX_SIZE:
        raise GrammarError(f"{len(text)} characters are too many, at most {MAX_SIZE}")


def together(start: str, parts: Sequence[Named]) -> str:
    """A grammar that refers to others by their names, as ``@name``."""
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start}, *parts]})


def _lark(text: str) -> str:
    convert = library("llguidance.gbnf_to_lark").any_to_lark
    try:
        return str(convert(text))
    except Exception as error:
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from error


def _lark_of_regex(pattern: str) -> str:
    """All of the text has to match, so that anchors at the ends say nothing."""
    return f"start: /{_without_anchors(pattern)}/"


def full_match(pattern: str) -> str:
    """The regex of texts in which a JSON schema's pattern is found somewhere."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if _ends_with_anchor(pattern) else "(?s:.*)"
    return f"{before}({_without_anchors(pattern)}){after}"


def _without_anchors(pattern: str) -> str:
    pattern = pattern.removeprefix("^")
    if _ends_with_anchor(pattern):
        pattern = pattern[:-1]
    return library().regex_to_lark(pattern, use_ascii="d")


def _ends_with_anchor(pattern: str) -> bool:
    return re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
