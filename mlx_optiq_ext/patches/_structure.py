"""Makes logits processors of what a call asks of the text that is generated."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..grammars import ConstraintProcessor, Kind, ReplyRules, Shape, Source
from ._request import STRUCTURE, current

KINDS: tuple[Kind, ...] = ("json_schema", "regex", "grammar")


class Structure:
    """What a call asks of each text.

    Args:
        tokenizer (TokenizerWrapper): Of the model.
        options (dict): Keyword arguments, from which those about it are taken.

    Raises:
        GrammarError: If a grammar is malformed, not supported or too complex.
        ImportError: If llguidance is not installed.
        ValueError: If arguments are malformed or exclude each other.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]):
        request = current.get()
        given = {} if request is None else dict(request.structure)
        given |= {name: options.pop(name) for name in STRUCTURE if name in options}
        shape = shape_of(given)
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        is_free = shape == Shape()
        self._rules = None if is_free else ReplyRules(shape, tokenizer)

    def processors(self, prompt: Any) -> list[ConstraintProcessor]:
        """Those for the text that follows a prompt.

        Args:
            prompt (str, mx.array or Sequence[int]): The prompt, or its tokens.
        """
        if self._rules is None:
            return []
        if isinstance(prompt, mx.array):
            prompt = prompt.tolist()
        return [ConstraintProcessor(self._rules.begin_after(prompt))]


def shape_of(given: dict[str, Any]) -> Shape:
    """Read what is asked of a reply.

    Args:
        given (dict): The arguments of ``generate`` that say so.

    Raises:
        ValueError: If they are malformed or exclude each other.
    """
    found = [kind for kind in KINDS if given.get(kind) is not None]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} exclude each other, expected one.")
    most = given.get("max_thinking_tokens")
    is_number = isinstance(most, int) and not isinstance(most, bool) and most >= 0
    if most is not None and not is_number:
        raise ValueError(f"max_thinking_tokens must not be negative, got {most!r}.")
    if not found:
        return Shape(max_thinking_tokens=most)
    (kind,) = found
    content = given[kind]
    if kind == "json_schema":
        content = read_schema(content)
    return Shape(Source(kind, content), max_thinking_tokens=most)


def read_schema(schema: Any) -> Any:
    """A JSON schema, which may be an object, its text, a file or a pydantic model.

    Raises:
        ValueError: If it is none of these.
    """
    if hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if isinstance(schema, os.PathLike):
        schema = Path(schema).read_text()
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from error


def constrain(tokenizer: Any, prompt: Any, options: dict[str, Any]) -> None:
    """Turn what is asked of a text into a logits processor, before all others.

    Args:
        tokenizer (TokenizerWrapper): Of the model.
        prompt (str, mx.array or Sequence[int]): The prompt, or its tokens.
        options (dict): The keyword arguments of ``stream_generate``; changed in place.
    """
    processors: Sequence[Any] = Structure(tokenizer, options).processors(prompt)
    own = options.get("logits_processors") or []
    options["logits_processors"] = [*processors, *own]
