"""Calls as JSON: ``{"name": "f", "arguments": {"x": 1}}``, of Qwen3 and Hermes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .._conversation import to_json
from .._events import CallPiece
from ._calls import CallReader, NotACallError
from ._schema import load_json
from ._source import EndOfText, Source, Steps

ARGUMENTS = ("arguments", "parameters")
OTHERS = ("id", "type", "index")
# Models break lines within strings, which JSON does not allow.
CONTROL = re.compile(r"[\x00-\x1f]")

Make = Callable[[str], CallPiece | None]


def read_json(calls: CallReader) -> Steps[None]:
    """Read one call, or a list of some."""
    if (yield from calls.source.next_is("[")):
        yield from _each(calls, "]", _Members.read)
    else:
        yield from _Members.read(calls)


class _Members:
    """The members of the object that is a call."""

    def __init__(self, calls: CallReader):
        self._calls = calls
        self._name: Any = None
        self._arguments: Any = None
        self._is_complete = False

    @classmethod
    def read(cls, calls: CallReader) -> Steps[None]:
        members = cls(calls)
        try:
            yield from members._object()
        except (EndOfText, NotACallError):
            # Only brackets are missing after arguments that were sent.
            if not members._is_complete:
                raise
        # Some models close more brackets than they have opened.
        while (yield from calls.source.next_is("}")):
            pass
        if members._is_complete:
            yield calls.finish()
        else:
            yield from calls.whole(members._name, members._arguments)

    def _object(self) -> Steps[None]:
        yield from expect(self._calls.source, "{")
        yield from _each(self._calls, "}", lambda _: self._member())

    def _member(self) -> Steps[None]:
        source = self._calls.source
        if (yield from source.peek()) != '"':
            raise NotACallError("expected a key")
        key = yield from read_value(source)
        yield from expect(source, ":")
        is_object = (yield from source.peek()) == "{"
        if key in ARGUMENTS and is_object and isinstance(self._name, str):
            yield self._calls.begin(self._name)
            yield from pass_value(source, self._calls.piece)
            self._is_complete = True
        elif key == "function" and is_object:
            yield from self._object()
        elif key in ("name", "function"):
            self._name = yield from read_value(source)
        elif key in ARGUMENTS:
            self._arguments = yield from read_value(source)
        elif key in OTHERS or self._is_complete:
            yield from read_value(source)
        else:
            raise NotACallError(f"a call has no {key!r}")


def _each(
    calls: CallReader, end: str, read: Callable[[CallReader], Steps[None]]
) -> Steps[None]:
    """Read what commas set apart, up to the end."""
    source = calls.source
    yield from source.skip_space()
    if (yield from source.next_is(end)):
        return
    while True:
        yield from source.skip_space()
        yield from read(calls)
        if (yield from expect(source, ",", end)) == end:
            return


def expect(source: Source, *choices: str) -> Steps[str]:
    """Take one of some texts, and the space around it.

    Raises:
        NotACallError: If something else comes.
    """
    yield from source.skip_space()
    if not (found := (yield from source.next_is(*choices))):
        if source.is_over and not source.rest:
            raise EndOfText
        raise NotACallError(f"expected one of {choices}")
    if found in (":", ","):
        yield from source.skip_space()
    return found


def read_value(source: Source) -> Steps[Any]:
    """Read a whole value."""
    pieces: list[str] = []
    yield from pass_value(source, pieces.append)
    try:
        return load_json("".join(pieces))
    except (ValueError, RecursionError) as exc:
        raise NotACallError(f"expected a value: {exc}") from exc


def pass_value(source: Source, make: Make) -> Steps[None]:
    """Hand on the text of a value."""
    first = yield from source.peek()
    if first == '"':
        yield from _pass_string(source, make)
    elif first in "{[":
        yield from _pass_nested(source, make)
    else:
        yield from source.before(make, (",", "}", "]", ":", '"', "{", "<"))


def _pass_nested(source: Source, make: Make) -> Steps[None]:
    depth = 0
    while True:
        ending = yield from source.through(make, ('"', "{", "}", "[", "]"))
        if ending == '"':
            yield from _pass_string(source, make, is_open=True)
            continue
        if piece := make(ending):
            yield piece
        depth += 1 if ending in "{[" else -1
        if depth == 0:
            return


def _pass_string(source: Source, make: Make, *, is_open: bool = False) -> Steps[None]:
    if not is_open:
        source.take(1)
    if piece := make('"'):
        yield piece
    while True:
        ending = yield from source.through(
            lambda text: make(CONTROL.sub(_escape, text)), ('"', "\\")
        )
        if ending == "\\":
            yield from source.peek()
            ending += source.take(1)
        if piece := make(ending):
            yield piece
        if ending == '"':
            return


def _escape(match: re.Match[str]) -> str:
    return to_json(match[0])[1:-1]
