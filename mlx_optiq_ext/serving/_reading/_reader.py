"""Turns what a model generates into thoughts, text and calls of tools.

Streamed replies and whole ones are made of the same events, so neither can say what the
other does not. Invariants:

- All texts and the sources of all calls add up to what was generated, less the markers
  of thoughts and less the white space with which templates set things apart.
- The pieces of a call add up to the JSON of its arguments.
- How the text was cut into tokens changes nothing but how the pieces are cut.
- A call that is not complete is not followed by an `End` that looks like one.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .._errors import APIError
from .._events import (
    Call,
    CallPiece,
    End,
    EndReason,
    Event,
    Text,
    Thought,
    Token,
    Usage,
)
from ._calls import CallReader, NotACallError
from ._format import OPENINGS, ReplyFormat
from ._schema import Declarations
from ._source import EndOfText, Source, Steps

MALFORMED = (
    "The model's call of {} is malformed, which showed after part of it was sent."
)
SHOWN: dict[str, type[Text | Thought]] = {"normal": Text, "reasoning": Thought}


class Response(Protocol):
    """What mlx-lm's server yields for a token."""

    text: str
    token: int
    logprob: float
    finish_reason: str | None
    top_tokens: Any


@dataclass
class Reading:
    """How a reply is to be read.

    Args:
        format (ReplyFormat, optional): The markers of the model. None: the reply is
          text as it is, markers and all.
        initial_state (str): "normal", "reasoning", "tool", or one of the format's own.
        tools (list[dict], optional): What the reply may call. Without any, a call is
          text.
        stop (Sequence[str]): Stop sequences. Only the answer is searched for them, as
          by the vendors' own servers: a thought that mentions one does not end the
          reply, nor does an argument.
        one_call (bool): The reply is over after its first call.
        is_cut_by_context (bool): What limits the reply is the size of the context.
        keeps_space (bool): Whether to leave white space as it was generated, even
          that with which templates set thoughts and calls apart.
        gives_tokens (bool): Whether to give a `Token` for each response.
    """

    format: ReplyFormat | None
    initial_state: str = "normal"
    tools: list[dict[str, Any]] | None = None
    stop: Sequence[str] = ()
    one_call: bool = False
    is_cut_by_context: bool = False
    keeps_space: bool = False
    gives_tokens: bool = False


def read_reply(
    responses: Iterable[Response], reading: Reading, usage: Usage
) -> Iterator[Event]:
    """The events of a reply; the last is an `End`.

    Args:
        responses (Iterable): A response for each token.
        reading (Reading): How to read them.
        usage (Usage): Counts the tokens.

    Raises:
        APIError: 500, if a call turns out malformed after part of it was given.
    """
    reader = _Reader(reading)
    finish_reason: str | None = "stop"
    for response in responses:
        usage.num_output_tokens += 1
        usage.num_thinking_tokens += reader.state == "reasoning"
        finish_reason = response.finish_reason
        if reading.gives_tokens:
            yield _token(response)
        for event in reader.feed(response.text):
            yield event
            if reading.one_call and isinstance(event, Call):
                yield End("stop")
                return
        if reader.stop_sequence is not None:
            yield End("stop_sequence", reader.stop_sequence)
            return
    yield from reader.close()
    yield End(_reason(finish_reason, reader.is_cut, reading.is_cut_by_context))


def _reason(finish_reason: str | None, is_cut: bool, by_context: bool) -> EndReason:
    if finish_reason == "length":
        return "context" if by_context else "length"
    return "length" if is_cut else "stop"


class _Reader:
    """Reads a reply from its beginning to its end.

    Args:
        reading (Reading): How.
    """

    def __init__(self, reading: Reading):
        self._reading = reading
        self._format = reading.format or ReplyFormat()
        self._tools = Declarations(reading.tools)
        self._source = Source()
        self._space = _Space(keeps=reading.keeps_space, state=reading.initial_state)
        self._steps = self._reply()
        self.state = reading.initial_state
        self.stop_sequence: str | None = None
        self.is_cut = False

    def feed(self, text: str) -> Iterator[Event]:
        self._source.feed(text)
        return self._run()

    def close(self) -> Iterator[Event]:
        """The events of what was held back, once nothing more can follow."""
        self._source.close()
        return self._run()

    def _run(self) -> Iterator[Event]:
        return joined(itertools.takewhile(lambda each: each is not None, self._steps))

    def _reply(self) -> Steps[None]:
        if self.state == "tool":
            self.state = "normal"
            yield from self._calls("")
        while marker := (yield from self._text()):
            if self.state == "normal" and marker in self._reading.stop:
                self.stop_sequence = marker
                return
            next_state = dict(self._edges())[marker]
            if next_state == "tool":
                yield from self._calls(marker)
            else:
                self._space.separate()
                self.state = next_state

    def _text(self) -> Steps[str]:
        """A run of text, up to a marker or a stop sequence."""
        stop = self._reading.stop if self.state == "normal" else ()
        markers = [marker for marker, _ in self._edges()]
        return (yield from self._source.pass_on(self._piece, [*stop, *markers]))

    def _edges(self) -> list[tuple[str, str]]:
        edges = self._format.transitions.get(self.state, [])
        return [edge for edge in edges if edge[1] != "tool" or self._reading.tools]

    def _piece(self, text: str) -> Event | None:
        if (kind := SHOWN.get(self.state)) and (text := self._space.feed(text)):
            return kind(text)
        return None

    def _calls(self, marker: str) -> Steps[None]:
        """The calls after a marker, which is text if there are none."""
        is_part, is_thought = marker in OPENINGS, self.state == "reasoning"
        calls = self._call_reader(only_declared=is_thought or is_part)
        self._source.mark()
        if is_part:
            self._source.back(len(marker))
        try:
            yield from self._each_call(calls)
            return
        except NotACallError as exc:
            if calls.is_begun:
                raise _malformed(calls.name) from exc
            logging.warning("The model's call of a tool could not be read: %r", exc)
        except EndOfText:
            self.is_cut = True
        if calls.is_begun:
            return
        self._source.reset()
        # A call that is closed is malformed, not cut off.
        end = self._format.call_end
        self.is_cut = self.is_cut and not (end and end in self._source.rest)
        if not calls.num_read and (event := self._piece(marker)):
            yield event

    def _each_call(self, calls: CallReader) -> Steps[None]:
        source, end = self._source, self._format.call_end
        while True:
            yield from self._format.read_call(calls)
            self._space.separate()
            source.mark()
            yield from source.skip_space()
            if (end and (yield from source.next_is(end))) or not source.rest:
                source.release()
                return

    def _call_reader(self, *, only_declared: bool) -> CallReader:
        is_thought, think_end = self.state == "reasoning", self._format.think_end
        return CallReader(
            self._source,
            self._format.call_end,
            self._tools,
            only_declared=only_declared,
            limits=[think_end] if is_thought and think_end else [],
        )


class _Space:
    """Drops the white space with which a template sets thoughts and calls apart.

    That is what comes before a thought, or before a text that follows something.
    """

    def __init__(self, *, keeps: bool, state: str):
        self._keeps = keeps
        self._is_first = state == "normal"
        self._held: str | None = "" if not keeps else None

    def separate(self) -> None:
        """Something else ends here, and a thought or text may begin."""
        self._is_first = False
        self._held = None if self._keeps else ""

    def feed(self, text: str) -> str:
        if self._held is None:
            return text
        text, self._held = self._held + text, None
        if not text.strip():
            self._held = text
            return ""
        return text if self._is_first else text.lstrip()


def joined(events: Iterable[Event | None]) -> Iterator[Event]:
    """Events with neighbours that are pieces of the same made one."""
    last: Event | None = None
    for event in events:
        if isinstance(event, (Text, Thought, CallPiece)) and isinstance(
            last, type(event)
        ):
            last = dataclasses.replace(event, text=last.text + event.text)
            continue
        if last is not None:
            yield last
        last = event
    if last is not None:
        yield last


def _token(response: Response) -> Token:
    top = response.top_tokens
    return Token(response.token, response.logprob, top, response.text)


def _malformed(name: str) -> APIError:
    return APIError(500, MALFORMED.format(name), code="server_error")
