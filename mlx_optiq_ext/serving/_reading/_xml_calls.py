"""Calls of Qwen3-Coder and 3.5: ``<function=f><parameter=x>1</parameter></function>``.

What ends a value is ``</parameter>`` with another parameter or the end of the call
after it, for the values of agents' tools are files, which may be about these markers.
"""

from __future__ import annotations

from .._conversation import to_json
from .._events import CallPiece
from ._calls import CallReader, NotACallError
from ._json_calls import pass_value
from ._schema import Declared
from ._source import EndOfText, Make, Source, Steps

CALL, END_OF_CALL = "<function=", "</function>"
PARAMETER, END_OF_PARAMETER = "<parameter=", "</parameter>"
NAME_ENDS = (">", "<", " ", "\n", "\t", "\r")


def read_xml(calls: CallReader) -> Steps[None]:
    """Read one call."""
    source = calls.source
    if not (yield from source.next_is(CALL)):
        raise NotACallError(f"expected {CALL}")
    name = yield from _name(source)
    yield from source.skip_space()
    yield from source.next_is(">")
    first = yield from _next(source, PARAMETER, END_OF_CALL, "{")
    yield calls.begin(name)
    if first == "{":
        source.back(len(first))
        yield from pass_value(source, calls.piece)
        yield from _next(source, END_OF_CALL)
    else:
        yield from _parameters(calls, first)
    yield calls.finish()


def _parameters(calls: CallReader, marker: str) -> Steps[None]:
    """All parameters, behind the marker of the first or of the end."""
    source, declared, separator = calls.source, calls.declared(), "{"
    while marker == PARAMETER:
        key = yield from _name(source)
        yield from source.next_is(">")
        yield from source.next_is("\n")
        member = f"{separator}{to_json(key)}: "
        yield from _value(calls, member, declared.member(key))
        marker = yield from _next(source, *_after_value(calls))
        separator = ", "
    if marker == calls.end:
        source.back(len(marker))
    yield calls.piece("}" if separator == ", " else "{}")


def _after_value(calls: CallReader) -> list[str]:
    """What can only come after a value; some models forget the end of the call."""
    return [PARAMETER, END_OF_CALL, *filter(None, [calls.end])]


def _next(source: Source, *markers: str) -> Steps[str]:
    """Take the one of some markers that comes next.

    Raises:
        NotACallError: If none does.
        EndOfText: If that is because the text is over.
    """
    yield from source.skip_space()
    if found := (yield from source.next_is(*markers)):
        return found
    raise EndOfText if source.is_over else NotACallError(f"expected one of {markers}")


def _name(source: Source) -> Steps[str]:
    pieces: list[str] = []
    yield from source.skip_space()
    yield from source.before(pieces.append, NAME_ENDS)
    if not pieces:
        raise NotACallError("expected a name")
    return "".join(pieces)


def _value(calls: CallReader, member: str, declared: Declared) -> Steps[None]:
    """A value, behind its key in one piece, so that what is cut off has values."""
    if declared.is_text:
        string = _String(calls, member, declared)
        yield from _pass_value(calls, string.feed)
        yield string.close()
        return
    pieces: list[str] = []
    yield from _pass_value(calls, pieces.append)
    yield calls.piece(member + to_json(declared.read("".join(pieces))))


def _pass_value(calls: CallReader, make: Make) -> Steps[None]:
    endings = (f"\n{END_OF_PARAMETER}", END_OF_PARAMETER)
    while True:
        ending = yield from calls.source.through(make, endings)
        if (yield from _is_end(calls)):
            return
        if piece := make(ending):
            yield piece


def _is_end(calls: CallReader) -> Steps[bool]:
    """Whether what comes next can only come after a value."""
    source = calls.source
    source.mark()
    yield from source.skip_space()
    found = yield from source.next_is(*_after_value(calls))
    is_end = bool(found) or (source.is_over and not source.rest)
    source.reset()
    return is_end


class _String:
    """A string on its way into JSON, as long as it cannot be the word for no value."""

    def __init__(self, calls: CallReader, member: str, declared: Declared):
        self._calls = calls
        self._member = member
        self._nulls = declared.nulls if declared.may_be_null else ()
        self._held: str | None = ""

    def feed(self, text: str) -> CallPiece | None:
        if self._held is None:
            return self._calls.quoted(text)
        self._held += text
        if any(null.startswith(self._held.lower()) for null in self._nulls):
            return None
        return self._open()

    def close(self) -> CallPiece:
        if self._held is None:
            return self._calls.piece('"')
        is_null = self._held.lower() in self._nulls
        return self._calls.piece(
            self._member + to_json(None if is_null else self._held)
        )

    def _open(self) -> CallPiece:
        text, self._held = self._held, None
        return self._calls.piece(self._member + to_json(text)[:-1])
