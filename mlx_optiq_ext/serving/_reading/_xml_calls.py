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
from ._source import Make, Source, Steps

CALL, END_OF_CALL = "<function=", "</function>"
PARAMETER, END_OF_PARAMETER = "<parameter=", "</parameter>"
NAME_ENDS = (">", "<", " ", "\n", "\t", "\r")


def read_xml(calls: CallReader) -> Steps[None]:
    """Read one call."""
    source = calls.source
    if not (yield from source.next_is(CALL)):
        raise NotACallError(f"expected {CALL}")
    yield calls.begin((yield from _name(source)))
    yield from source.skip_space()
    if (yield from source.peek()) == "{":
        yield from pass_value(source, calls.piece)
        yield from _skip_to(calls, END_OF_CALL)
    else:
        yield from _parameters(calls)
    yield calls.finish()


def _parameters(calls: CallReader) -> Steps[None]:
    declared, separator = calls.declared(), "{"
    while (yield from _skip_to(calls, PARAMETER, END_OF_CALL)) == PARAMETER:
        key = yield from _name(calls.source)
        yield calls.piece(f"{separator}{to_json(key)}: ")
        yield from calls.source.next_is("\n")
        yield from _value(calls, declared.member(key))
        separator = ", "
    yield calls.piece("}" if separator == ", " else "{}")


def _skip_to(calls: CallReader, *wanted: str) -> Steps[str]:
    """Take the next of some markers; the end of all calls is left where it is."""
    endings = (*wanted, calls.end) if calls.end else wanted
    found = yield from calls.source.through(lambda text: None, endings)
    if found == calls.end:
        calls.source.back(len(found))
    return found


def _name(source: Source) -> Steps[str]:
    pieces: list[str] = []
    yield from source.skip_space()
    yield from source.before(pieces.append, NAME_ENDS)
    yield from source.next_is(">")
    if not pieces:
        raise NotACallError("expected a name")
    return "".join(pieces)


def _value(calls: CallReader, declared: Declared) -> Steps[None]:
    if declared.is_text:
        string = _String(calls, declared)
        yield from _pass_value(calls, string.feed)
        yield string.close()
        return
    pieces: list[str] = []
    yield from _pass_value(calls, pieces.append)
    yield calls.piece(to_json(declared.read("".join(pieces))))


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
    markers = [PARAMETER, END_OF_CALL, *filter(None, [calls.end])]
    found = yield from source.next_is(*markers)
    is_end = bool(found) or (source.is_over and not source.rest)
    source.reset()
    return is_end


class _String:
    """A string on its way into JSON, as long as it cannot be the word for no value."""

    def __init__(self, calls: CallReader, declared: Declared):
        self._calls = calls
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
        if self._held.lower() in self._nulls:
            return self._calls.piece("null")
        return self._calls.piece(f"{to_json(self._held)}")

    def _open(self) -> CallPiece:
        assert self._held is not None
        text, self._held = self._held, None
        return self._calls.piece(to_json(text)[:-1])
