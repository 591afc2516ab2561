"""Calls in the formats that only mlx-lm's own parsers read, once they are complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._calls import CallReader, NotACallError
from ._source import EndOfText, Steps

Parser = Callable[[str, Any], Any]

# All formats begin with the name of the tool, so that prose is known by this length.
NUM_CHARACTERS_TO_NAME = 256


def read_whole(calls: CallReader, parser: Parser | None) -> Steps[None]:
    """Read all calls up to the marker after them."""
    text = _Text(calls)
    endings = [*filter(None, [calls.end]), *calls.limits]
    ending = yield from calls.source.pass_on(text.feed, endings)
    if ending in calls.limits:
        raise NotACallError("a thought ended")
    if calls.end and not ending:
        # Some parsers would take a call that is cut off for one.
        raise EndOfText if text.names_tool() else NotACallError("no tool is named")
    try:
        found = parser and parser(text.text, calls.tools.given)
    # Parsers index and match whatever a model wrote: anything can come out of them.
    except Exception as exc:
        raise (NotACallError(repr(exc)) if ending else EndOfText()) from exc
    if ending:
        calls.source.back(len(ending))
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, dict):
            raise NotACallError(f"expected a call, got {call!r}")
        arguments = call.get("arguments", call.get("parameters"))
        yield from calls.whole(call.get("name"), arguments, call.get("id"))


class _Text:
    """The text of calls, given up as soon as it cannot be that."""

    def __init__(self, calls: CallReader):
        self._calls = calls
        self.text = ""

    def names_tool(self) -> bool:
        return self._calls.tools.are_in(self.text)

    def feed(self, text: str) -> None:
        was_short = len(self.text) < NUM_CHARACTERS_TO_NAME
        self.text += text
        is_long = len(self.text) >= NUM_CHARACTERS_TO_NAME
        if was_short and is_long and not self.names_tool():
            raise NotACallError("no tool is named")
