"""Readers of calls of tools while a model is still writing them.

Each turns the text of one of mlx-lm's formats into the JSON of the arguments, as far as
it is certain what comes next. Whether it was a call is known at its end, when mlx-lm's
own parser has read all of it; what was sent is compared with that. Formats that are not
here are sent when they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ._chat import to_json
from ._stop import num_undecided

Parser = Callable[[str, Any], Any]


class CallStream:
    """Reads one call: its beginning, with the name of the tool, and then the rest.

    ``name`` is None until it is known.
    """

    _START: re.Pattern[str]

    def __init__(self) -> None:
        self.name: str | None = None
        self._rest = ""

    def feed(self, text: str) -> str:
        """What more of the JSON of the arguments is known with this text."""
        self._rest += text
        if self.name is None:
            match = self._START.search(self._rest)
            if match is None:
                return ""
            self.name = match[1]
            self._rest = self._rest[match.end() :]
        return self._read()

    def close(self) -> str:
        """The rest of the JSON, if the text is over."""
        return ""

    def _read(self) -> str:
        """Take from the text behind the beginning what is known."""
        raise NotImplementedError


class JSONCallStream(CallStream):
    """``{"name": "f", "arguments": {"x": 1}}``, of whose arguments nothing changes."""

    _START = re.compile(
        r'\A\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)'
    )

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._is_in_string = self._is_escaped = self._is_over = False

    def _read(self) -> str:
        """The text up to the end of the outermost object."""
        text, self._rest = self._rest, ""
        for position, character in enumerate(text):
            if self._is_over:
                return text[:position]
            self._step(character)
            self._is_over = self._depth == 0
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


class GemmaCallStream(CallStream):
    """``call:f{x:1,text:<|"|>...<|"|>}``: bare keys, and quotes of its own."""

    _START = re.compile(r"call:([\w-]+)(?=\{)")
    _QUOTE = '<|"|>'
    _KEY = re.compile(r"([{,])(\w+):")
    _MAY_BE_KEY = re.compile(r"[{,]\w*$")

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._is_in_string = self._is_over = False

    def _read(self) -> str:
        parts = self._rest.split(self._QUOTE)
        known = [self._known(part) + self._turn() for part in parts[:-1]]
        num_known = len(parts[-1]) - self._num_held(parts[-1])
        self._rest = parts[-1][num_known:]
        return "".join([*known, self._known(parts[-1][:num_known])])

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
        num_held = num_undecided(text, [self._QUOTE])
        if not self._is_in_string and (match := self._MAY_BE_KEY.search(text)):
            num_held = max(num_held, len(match[0]))
        return num_held


class XMLCallStream(CallStream):
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
    _ENDS = (_END, f"\n{_END}")

    def __init__(self, parser: Parser, tools: list[dict[str, Any]] | None):
        super().__init__()
        self._parser = parser
        self._tools = tools
        self._key: str | None = None
        self._num_parameters = 0
        self._is_string = self._is_open = False

    def close(self) -> str:
        return "}" if self._num_parameters else "{}"

    def _read(self) -> str:
        known = ""
        while more := self._step():
            known += more
        return known

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
        self._is_string, self._is_open = self._convert("[1]") == "[1]", False
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
            known = to_json(self._convert(value))
        self._key = None
        return known

    def _piece(self) -> str:
        """As much of an unfinished value as is sure to be in the string."""
        if not self._is_string:
            return ""
        num_known = len(self._rest) - num_undecided(self._rest, self._ENDS)
        known, rest = self._rest[:num_known], self._rest[num_known:]
        # A value that is no more than this word is no string.
        if not self._is_open and "null".startswith(known.lower()):
            return ""
        quote = "" if self._is_open else '"'
        self._rest, self._is_open = rest, True
        return quote + escaped(known)

    def _convert(self, value: str) -> Any:
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
