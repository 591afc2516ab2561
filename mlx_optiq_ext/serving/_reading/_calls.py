"""Calls of tools, read while a model is still writing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .._conversation import to_json
from .._events import Call, CallPiece, CallStart, Event
from ._schema import Declarations, Declared, load_json
from ._source import Source, Steps


class NotACallError(ValueError):
    """The text is not what a call looks like."""


class CallReader:
    """Reads the calls between two markers, for whichever format they are in.

    Args:
        source (Source): The text, after the first marker.
        end (str): The second marker, "" if there is none.
        tools (Declarations): The tools of the request.
        only_declared (bool): What names no tool of the request is no call.
        limits (Sequence[str]): What else ends a text that is no call.
    """

    def __init__(
        self,
        source: Source,
        end: str,
        tools: Declarations,
        *,
        only_declared: bool = False,
        limits: Sequence[str] = (),
    ):
        self.source = source
        self.end = end
        self.tools = tools
        self.limits = tuple(limits)
        self._only_declared = only_declared
        self._name: str | None = None
        self._id: str | None = None
        self._sent: list[str] = []
        self.num_read = 0

    @property
    def is_begun(self) -> bool:
        """Whether something of a call was sent that is not complete."""
        return self._name is not None

    @property
    def name(self) -> str:
        return self._name or ""

    def begin(self, name: str, call_id: str | None = None) -> CallStart:
        """The first event of a call; from here on its text is not text any more.

        Raises:
            NotACallError: If this cannot be the name of a tool here.
        """
        if not name or (self._only_declared and name not in self.tools):
            raise NotACallError(f"there is no tool named {name!r}")
        self.source.release()
        self._name, self._id, self._sent = name, call_id, []
        return CallStart(name, call_id)

    def declared(self) -> Declared:
        """What is declared of the arguments."""
        return self.tools.of(self.name)

    def piece(self, text: str) -> CallPiece:
        self._sent.append(text)
        return CallPiece(text)

    def quoted(self, text: str) -> CallPiece:
        """A piece of a string, as it is within the quotes."""
        return self.piece(to_json(text)[1:-1])

    def finish(self) -> Call:
        """The last event of a call.

        Raises:
            NotACallError: If its pieces do not add up to an object.
        """
        try:
            arguments = load_json("".join(self._sent))
        except (ValueError, RecursionError) as exc:
            raise NotACallError(f"the arguments are no JSON: {exc}") from exc
        if not isinstance(arguments, dict):
            raise NotACallError("the arguments are no object")
        call = Call(self.name, arguments, self._id)
        self._name = None
        self.num_read += 1
        return call

    def whole(
        self, name: Any, arguments: Any, call_id: str | None = None
    ) -> Steps[None]:
        """The events of a call that is known all at once.

        Raises:
            NotACallError: If it is none.
        """
        try:
            if isinstance(arguments, str):
                arguments = load_json(arguments or "{}")
            text = json.dumps(
                {} if arguments is None else arguments,
                ensure_ascii=False,
                allow_nan=False,
            )
        except (TypeError, ValueError) as exc:
            raise NotACallError(f"the arguments are no JSON: {exc}") from exc
        if not isinstance(name, str) or not text.startswith("{"):
            raise NotACallError("expected a name and an object")
        events: list[Event] = [self.begin(name, call_id), self.piece(text)]
        yield from [*events, self.finish()]
