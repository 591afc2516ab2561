"""Calls of Gemma-4: ``call:f{x:1,text:<|"|>...<|"|>}``, bare keys and own quotes.

A key is what comes before a colon; a key that is declared may have colons in it.
"""

from __future__ import annotations

from .._conversation import to_json
from ._calls import CallReader, NotACallError
from ._json_calls import expect, read_value
from ._schema import Declared, read_bare
from ._source import Steps

CALL = "call:"
QUOTE = '<|"|>'


def read_gemma(calls: CallReader) -> Steps[None]:
    """Read one call."""
    source, pieces = calls.source, list[str]()
    if not (yield from source.next_is(CALL)):
        raise NotACallError(f"expected {CALL}")
    ending = yield from source.through(pieces.append, ("{", "}", "<", "\n"))
    if ending != "{":
        raise NotACallError("expected arguments")
    yield calls.begin("".join(pieces).strip())
    yield from _object(calls, calls.declared())
    yield calls.finish()


def _object(calls: CallReader, declared: Declared) -> Steps[None]:
    """An object, behind its opening brace."""
    yield calls.piece("{")
    yield from calls.source.skip_space()
    is_first = True
    while not (yield from calls.source.next_is("}")):
        key = yield from _key(calls, declared.names)
        yield calls.piece(f"{'' if is_first else ', '}{to_json(key)}: ")
        yield from _value(calls, declared.member(key))
        yield from _separator(calls, "}")
        is_first = False
    yield calls.piece("}")


def _array(calls: CallReader, declared: Declared) -> Steps[None]:
    """An array, behind its opening bracket."""
    yield calls.piece("[")
    yield from calls.source.skip_space()
    is_first = True
    while not (yield from calls.source.next_is("]")):
        if not is_first:
            yield calls.piece(", ")
        yield from _value(calls, declared.item())
        yield from _separator(calls, "]")
        is_first = False
    yield calls.piece("]")


def _separator(calls: CallReader, end: str) -> Steps[None]:
    """Take a comma; the end is left where it is."""
    if (yield from expect(calls.source, ",", end)) == end:
        calls.source.back(len(end))


def _key(calls: CallReader, names: set[str]) -> Steps[str]:
    source = calls.source
    if (yield from source.peek()) == '"':
        key = yield from read_value(source)
        yield from expect(source, ":")
        return str(key)
    pieces: list[str] = []
    if (yield from source.next_is(QUOTE)):
        yield from source.through(pieces.append, (QUOTE,))
        yield from expect(source, ":")
        return "".join(pieces)
    while True:
        if (yield from source.through(pieces.append, (":", "{", "}", ","))) != ":":
            raise NotACallError("expected a key")
        key = "".join(pieces).strip()
        yield from source.skip_space()
        if not (yield from _goes_on(calls, key, names)):
            return key
        pieces.append(":")


def _goes_on(calls: CallReader, key: str, names: set[str]) -> Steps[bool]:
    """Whether the colon that was read belongs to the key.

    That is so if the key is declared, or if a value cannot be what follows.
    """
    prefix = f"{key}:"
    longer = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    calls.source.mark()
    is_longer = yield from calls.source.next_is(*(f"{rest}:" for rest in longer))
    calls.source.reset()
    if is_longer:
        return True
    if key in names or (yield from calls.source.peek()) in '<"{[-0123456789':
        return False
    calls.source.mark()
    ending = yield from calls.source.through(
        lambda text: None, (":", ",", "}", " ", "\n")
    )
    calls.source.reset()
    return ending == ":"


def _value(calls: CallReader, declared: Declared) -> Steps[None]:
    source = calls.source
    if (yield from source.next_is(QUOTE)):
        yield calls.piece('"')
        yield from source.through(calls.quoted, (QUOTE,))
        yield calls.piece('"')
    elif (yield from source.next_is("{")):
        yield from _object(calls, declared)
    elif (yield from source.next_is("[")):
        yield from _array(calls, declared)
    elif (yield from source.peek()) == '"':
        yield calls.piece(to_json((yield from read_value(source))))
    else:
        yield from _bare(calls, declared)


def _bare(calls: CallReader, declared: Declared) -> Steps[None]:
    """A number or a word, perhaps a string without its quotes."""
    pieces: list[str] = []
    yield from calls.source.before(pieces.append, (",", "}", "]"))
    text = "".join(pieces).strip()
    value = declared.read(text) if declared.types else read_bare(text)
    yield calls.piece(to_json(value))
