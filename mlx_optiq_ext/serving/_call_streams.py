"""Readers of calls of tools while a model is still writing them.

Each turns the text of one of mlx-lm's formats into the JSON of the arguments, as far as
it is certain what comes next. Whether it was a call is known at its end, when mlx-lm's
own parser has read all of it; what was sent is compared with that. Formats that are not
here are sent when they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

from ._chat import to_json

Parser = Callable[[str, Any], Any]


class CallStream(Protocol):
    """Reads one call."""

    @property
    def name(self) -> str | None:
        """The tool, once it is known."""
        ...

    def feed(self, text: str) -> str:
        """What more of the JSON of the arguments is known with this text."""
        ...

    def close(self) -> str:
        """The rest of the JSON, if the text is over."""
        ...


class JSONCallStream:
    """``{"name": "f", "arguments": {"x": 1}}``, of whose arguments nothing changes."""

    _START = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*\{')

    def __init__(self) -> None:
        self.name: str | None = None
        self._beginning = ""
        self._depth = 1
        self._is_in_string = self._is_escaped = False

    def feed(self, text: str) -> str:
        if self.name is not None:
            return self._arguments(text)
        self._beginning += text
        match = self._START.match(self._beginning)
        if match is None:
            return ""
        self.name = match[1]
        return "{" + self._arguments(self._beginning[match.end() :])

    def close(self) -> str:
        return ""

    def _arguments(self, text: str) -> str:
        """The part of a text before the end of the outermost object."""
        for position, character in enumerate(text):
            if self._depth == 0:
                return text[:position]
            self._step(character)
        return text

    def _step(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = self._is_in_string
        elif character == '"':
            self._is_in_string = not self._is_in_string
        elif not self._is_in_string:
            self._depth += (character in "{[") - (character in "}]")


class GemmaCallStream:
    """``call:f{x:1,text:<|"|>...<|"|>}``: bare keys, and quotes of its own."""

    _START = re.compile(r"call:([\w-]+)(?=\{)")
    _QUOTE = '<|"|>'
    _KEY = re.compile(r"([{,])(\w+):")
    _MAY_BE_KEY = re.compile(r"[{,]\w*$")

    def __init__(self) -> None:
        self.name: str | None = None
        self._rest = ""
        self._depth = 0
        self._is_in_string = self._is_over = False

    def feed(self, text: str) -> str:
        self._rest += text
        if self.name is None:
            match = self._START.search(self._rest)
            if match is None:
                return ""
            self.name = match[1]
            self._rest = self._rest[match.end() :]
        parts = self._rest.split(self._QUOTE)
        known = [self._known(part) + self._turn() for part in parts[:-1]]
        num_known = len(parts[-1]) - self._num_held(parts[-1])
        self._rest = parts[-1][num_known:]
        return "".join([*known, self._known(parts[-1][:num_known])])

    def close(self) -> str:
        return ""

    def _known(self, text: str) -> str:
        if self._is_over:
            return ""
        if self._is_in_string:
            return escaped(text)
        for position, character in enumerate(text, 1):
            self._depth += (character == "{") - (character == "}")
            if self._depth == 0:
                self._is_over = True
                text = text[:position]
                break
        return self._KEY.sub(r'\1"\2":', text)

    def _turn(self) -> str:
        """Go into a string or out of it."""
        self._is_in_string = not self._is_in_string
        return "" if self._is_over else '"'

    def _num_held(self, text: str) -> int:
        num_held = num_beginning(text, self._QUOTE)
        if not self._is_in_string and (match := self._MAY_BE_KEY.search(text)):
            num_held = max(num_held, len(match[0]))
        return num_held


class XMLCallStream:
    """``<function=f><parameter=x>...</parameter></function>``, of Qwen3-Coder and 3.5.

    The value of a parameter is a string if mlx-lm's parser says so, whatever it holds.
    Other values are sent when they are complete.

    Args:
        parser (Callable): mlx-lm's.
        tools (list[dict], optional): What it is told about the tools.
    """

    _START = re.compile(r"<function=\s*([^\s<>]+)(?:>|(?=[\s<]))")
    _PARAMETER = re.compile(r"<parameter=\s*([^\s<>]+)(?:>|(?=[\s<]))")
    _END = "</parameter>"

    def __init__(self, parser: Parser, tools: list[dict[str, Any]] | None):
        self.name: str | None = None
        self._parser = parser
        self._tools = tools
        self._rest = ""
        self._key: str | None = None
        self._num_parameters = 0
        self._is_string = self._is_open = False

    def feed(self, text: str) -> str:
        self._rest += text
        if self.name is None and (match := self._START.search(self._rest)):
            self.name = match[1]
            self._rest = self._rest[match.end() :]
        known = ""
        while self.name is not None and (more := self._step()):
            known += more
        return known

    def close(self) -> str:
        return "}" if self._num_parameters else "{}"

    def _step(self) -> str:
        return self._begin() if self._key is None else self._value()

    def _begin(self) -> str:
        """The name of a parameter."""
        match = self._PARAMETER.search(self._rest)
        # What follows tells whether the first line break belongs to the value.
        if match is None or match.end() == len(self._rest):
            return ""
        self._key = match[1]
        self._rest = self._rest[match.end() :].removeprefix("\n")
        self._is_string, self._is_open = self._read("[1]") == "[1]", False
        self._num_parameters += 1
        separator = "{" if self._num_parameters == 1 else ", "
        return f"{separator}{to_json(self._key)}: "

    def _value(self) -> str:
        value, end, rest = self._rest.partition(self._END)
        if not end:
            return self._piece()
        self._rest = rest
        if self._is_open:
            known = escaped(value.removesuffix("\n")) + '"'
        else:
            known = to_json(self._read(value))
        self._key = None
        return known

    def _piece(self) -> str:
        """As much of an unfinished value as is sure to be in the string."""
        if not self._is_string:
            return ""
        ends = (self._END, f"\n{self._END}")
        num_held = max(num_beginning(self._rest, end) for end in ends)
        num_known = len(self._rest) - num_held
        known, rest = self._rest[:num_known], self._rest[num_known:]
        # A value that is no more than this word is no string.
        if not self._is_open and "null".startswith(known.lower()):
            return ""
        quote = "" if self._is_open else '"'
        self._rest, self._is_open = rest, True
        return quote + escaped(known)

    def _read(self, value: str) -> Any:
        """What mlx-lm makes of a value, None if it is an error, which then ends it."""
        call = (
            f"<function={self.name}><parameter={self._key}>\n{value}</parameter>"
            "</function>"
        )
        try:
            return self._parser(call, self._tools)["arguments"][self._key]
        except Exception:
            return None


def stream_call(
    parser: Parser | None, tools: list[dict[str, Any]] | None
) -> CallStream | None:
    """A reader for the format of one of mlx-lm's parsers, None if there is none."""
    name = getattr(parser, "__module__", "").removeprefix("mlx_lm.tool_parsers.")
    if name == "json_tools":
        return JSONCallStream()
    if name == "gemma4":
        return GemmaCallStream()
    if name == "qwen3_coder" and parser is not None:
        return XMLCallStream(parser, tools)
    return None


def escaped(text: str) -> str:
    """A text as it is within the quotes of a JSON string."""
    return to_json(text)[1:-1]


def num_beginning(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if marker.startswith(text[-size:])), 0)
