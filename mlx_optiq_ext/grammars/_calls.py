"""Grammars of calls of tools, in the format in which a model writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._errors import GrammarError
from ._gemma_values import GemmaValues
from ._lark import LarkWriter, alternatives, literal
from ._sources import Schema
from ._xml_values import XMLValues

SUPPORTED = "Qwen3's (JSON), Qwen3.5's (XML) and Gemma-4's"
UNSUPPORTED = (
    "calls in the format of this model cannot be enforced; the formats that can are "
    f"{SUPPORTED}"
)


@dataclass(frozen=True)
class Tool:
    """A tool that a model may call.

    Args:
        name (str): Its name.
        parameters (dict): The JSON schema of its arguments.
        is_strict (bool): Whether a keyword of it that cannot be enforced is an error.
    """

    name: str
    parameters: Schema = field(hash=False)
    is_strict: bool = False

    @property
    def schema(self) -> Schema:
        """The schema, in which arguments that are not declared are not allowed."""
        schema: Schema = {"type": "object", **self.parameters}
        if schema.get("properties"):
            schema.setdefault("additionalProperties", False)
        return schema


class CallGrammar:
    """The grammar of calls in the format of a tokenizer's model.

    Args:
        tools (tuple[Tool, ...]): Those that may be called.
        tokenizer (TokenizerWrapper): mlx-lm's.
        writer (LarkWriter): Gets the rules.

    Raises:
        GrammarError: If calls in that format cannot be enforced.
    """

    def __init__(self, tools: tuple[Tool, ...], tokenizer: Any, writer: LarkWriter):
        name = format_of(tokenizer)
        if name not in BODIES:
            raise GrammarError(UNSUPPORTED)
        self._start = writer.marker(tokenizer.tool_call_start)
        self._end = writer.marker(tokenizer.tool_call_end)
        make, self._space = BODIES[name]
        bodies = [make(writer, tool) for tool in tools]
        self._body = writer.rule(alternatives(bodies))

    @property
    def behind_marker(self) -> str:
        """A call, behind the marker with which it starts."""
        return f"{self._space} {self._body} {self._space} {self._end}"

    def calls(self, one_call: bool) -> str:
        """A call, or several if there may be."""
        call = f"{self._start} {self.behind_marker}"
        return call if one_call else f"{call} ({self._space} {call})*"


def format_of(tokenizer: Any) -> str:
    """The name of mlx-lm's parser for the calls of a model."""
    module = getattr(tokenizer.tool_parser, "__module__", "")
    return module.removeprefix("mlx_lm.tool_parsers.")


def _json_body(writer: LarkWriter, tool: Tool) -> str:
    """``{"name": "f", "arguments": {"x": 1}}``"""
    name = literal(tool.name)
    arguments = writer.json_value(tool.schema, tool.schema, tool.is_strict)
    beginning = literal(f'{{"name": {name}, "arguments": ')
    return f'{beginning} {arguments} "}}"'


def _xml_body(writer: LarkWriter, tool: Tool) -> str:
    """``<function=f>``, and then each argument in an element of its own."""
    values = XMLValues(writer, tool.schema, tool.is_strict)
    beginning = literal(f"<function={tool.name}>\n")
    return f'{beginning} {values.arguments()} "</function>"'


def _gemma_body(writer: LarkWriter, tool: Tool) -> str:
    """``call:f{x:1}``"""
    values = GemmaValues(writer, tool.schema, tool.is_strict)
    return f"{literal(f'call:{tool.name}')} {values.value(tool.schema)}"


# By the name of mlx-lm's parser: what a call consists of, and what sets it apart.
BODIES: dict[str, tuple[Callable[[LarkWriter, Tool], str], str]] = {
    "json_tools": (_json_body, literal("\n")),
    "qwen3_coder": (_xml_body, literal("\n")),
    "gemma4": (_gemma_body, literal("")),
}
