"""Splits what mlx-lm generates into thoughts, text and calls of tools."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from mlx_lm.generate import TextStateMachine

from ._call_streams import CallStream, Parser, stream_call
from ._errors import APIError
from ._events import Call, CallPiece, CallStart, End, Event, Text, Thought, Usage
from ._stop import StopMatcher

# A space at the start of a token, in byte-level vocabularies and in SentencePiece's.
SPACES = ("\u0120", "\u2581")

MALFORMED = (
    "The model's call of {} is malformed, which showed after part of it was sent."
)


class Response(Protocol):
    """What mlx-lm's server yields for a token."""

    text: str
    finish_reason: str | None


class Splitter:
    """Turns pieces of generated text into events.

    Args:
        state_machine (TextStateMachine): Knows the model's markers, no stop words.
        initial_state (str): "normal", "reasoning" or "tool".
        parser (Callable, optional): Reads the text between the markers of a call.
        tools (list[dict], optional): What the parser is told about the tools.
        stop (Iterable[str]): Stop sequences. Only the answer's text is searched:
          a thought that mentions one does not end the reply, nor do arguments.
        streams_calls (bool): Whether to give calls in pieces, where that is possible.
    """

    def __init__(
        self,
        state_machine: TextStateMachine,
        initial_state: str,
        parser: Parser | None = None,
        tools: list[dict[str, Any]] | None = None,
        stop: Iterable[str] = (),
        *,
        streams_calls: bool = False,
    ):
        self._state = state_machine.make_state(initial_state)
        self.current = initial_state
        self._parser = parser
        self._tools = tools
        self._matcher = StopMatcher(stop)
        self._streams_calls = streams_calls
        self._call = self._sent = ""
        self._call_stream: CallStream | None = None

    @property
    def stop_sequence(self) -> str | None:
        return self._matcher.matched

    def feed(self, text: str) -> Iterator[Event]:
        self._state, segments = _split(self._state, text)
        yield from self._events(segments)

    def close(self, *, is_cut: bool = False) -> Iterator[Event]:
        """The events of what was held back.

        Args:
            is_cut (bool): The model would have gone on.
        """
        self._state, text, state = TextStateMachine.flush(self._state)
        yield from self._events([(state, text)])
        yield from self._leave(is_cut)

    def _events(self, segments: list[tuple[str, str]]) -> Iterator[Event]:
        for state, text in segments:
            if state != self.current:
                yield from self._leave()
            self.current = state
            if self.stop_sequence is not None:
                return
            if text:
                yield from self._piece(text)

    def _piece(self, text: str) -> Iterator[Event]:
        if self.current == "tool":
            yield from self._call_piece(text)
        elif self.current == "reasoning":
            yield Thought(text)
        elif text := self._matcher.feed(text):
            yield Text(text)

    def _call_piece(self, text: str) -> Iterator[Event]:
        if not self._call and self._streams_calls:
            self._call_stream = stream_call(self._parser, self._tools)
        self._call += text
        if (stream := self._call_stream) is None:
            return
        was_named = stream.name is not None
        piece = stream.feed(text)
        if not was_named and stream.name is not None:
            yield CallStart(stream.name)
        yield from self._send(piece)

    def _send(self, piece: str) -> Iterator[Event]:
        if piece:
            self._sent += piece
            yield CallPiece(piece)

    def _leave(self, is_cut: bool = False) -> Iterator[Event]:
        if self.current == "tool":
            yield from self._leave_call(is_cut)
        elif self.stop_sequence is None and (text := self._matcher.flush()):
            yield Text(text)

    def _leave_call(self, is_cut: bool) -> Iterator[Event]:
        events = read_calls(self._call, self._parser, self._tools)
        stream = self._call_stream
        if stream is not None and stream.name is not None:
            rest = stream.close()
            if _begins_with(events, stream.name, self._sent + rest):
                yield from self._send(rest)
            elif is_cut:
                events = []
            else:
                raise APIError(500, MALFORMED.format(stream.name), code="server_error")
        self._call, self._sent, self._call_stream = "", "", None
        yield from events


def read_calls(
    text: str, parser: Parser | None, tools: list[dict[str, Any]] | None
) -> list[Event]:
    """The calls in the text between a model's markers.

    What is no call, for it was cut off or made up, is shown as it is, so that the
    client and the model can see what happened.
    """
    if not text.strip() or parser is None:
        return [Text(text)] if text.strip() else []
    # Parsers index and match whatever a model wrote: anything can come out of them.
    try:
        parsed = parser(text, tools)
        return [_read_call(call) for call in _as_list(parsed)]
    except Exception as exc:
        logging.warning("The model's call of a tool could not be read: %r", exc)
        return [Text(text)]


def read_reply(
    responses: Iterable[Response],
    splitter: Splitter,
    usage: Usage,
    *,
    one_call: bool = False,
    is_cut_by_context: bool = False,
) -> Iterator[Event]:
    """The events of a reply; the last is an `End`.

    Args:
        responses (Iterable): One for each token.
        splitter (Splitter): Turns their text into events.
        usage (Usage): Counts the tokens.
        one_call (bool): The reply is over after its first call.
        is_cut_by_context (bool): What limits the reply is the size of the context.
    """
    finish_reason: str | None = "stop"
    for response in responses:
        usage.num_output_tokens += 1
        usage.num_thinking_tokens += splitter.current == "reasoning"
        finish_reason = response.finish_reason
        for event in splitter.feed(response.text):
            yield event
            if one_call and isinstance(event, Call):
                yield End("stop")
                return
        if splitter.stop_sequence is not None:
            break
    if splitter.stop_sequence is None:
        yield from splitter.close(is_cut=finish_reason == "length")
    yield _end(finish_reason, splitter.stop_sequence, is_cut_by_context)


def with_leading_space(responses: Iterable[Any], tokenizer: Any) -> Iterator[Any]:
    """Give a reply that continues a text the space that mlx-lm takes from it.

    Args:
        responses (Iterable[Response]): Of mlx-lm's server, one for each token.
        tokenizer: Knows how the first of them is spelled.
    """
    responses = iter(responses)
    for response in itertools.islice(responses, 1):
        token = tokenizer.convert_ids_to_tokens(response.token)
        if token.startswith(SPACES) and not response.text.startswith(" "):
            response = dataclasses.replace(response, text=f" {response.text}")
        yield response
    yield from responses


def trim(events: Iterable[Event]) -> Iterator[Event]:
    """Drop the white space with which a template sets thoughts and calls apart.

    That is what comes before a thought, or before a text that follows something.
    """
    run: type | None = None
    held, has_begun, keeps = "", False, True
    for event in events:
        if type(event) is not run:
            keeps = run is None and isinstance(event, Text)
            run, held, has_begun = type(event), "", False
        if has_begun or not isinstance(event, (Text, Thought)):
            yield event
            continue
        held += event.text
        if held.strip():
            has_begun = True
            yield type(event)(held if keeps else held.lstrip())


def _end(
    finish_reason: str | None, stop_sequence: str | None, is_cut_by_context: bool
) -> End:
    if stop_sequence is not None:
        return End("stop_sequence", stop_sequence)
    if finish_reason != "length":
        return End("stop")
    return End("context" if is_cut_by_context else "length")


def _split(state: Any, text: str) -> tuple[Any, list[tuple[str, str]]]:
    if hasattr(TextStateMachine, "split"):
        return TextStateMachine.split(state, text)
    # mlx-lm 0.32.0 does not say which text belongs to which state, so it is asked for
    # each character; and it reads what it holds back again, so it starts at the root.
    segments = []
    for character in text:
        name, _, states, held = state
        state, safe, after = TextStateMachine.step(
            (name, states[name][0], states, held), character
        )
        segments += [(name, safe), (after, "")]
    return state, segments


def _begins_with(events: list[Event], name: str, arguments: str) -> bool:
    try:
        return events[:1] == [Call(name, json.loads(arguments))]
    except ValueError:
        return False


def _as_list(parsed: Any) -> list[Any]:
    return parsed if isinstance(parsed, list) else [parsed]


def _read_call(call: dict[str, Any]) -> Call:
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or not isinstance(call["name"], str):
        raise ValueError(f"expected a name and an object, got {call!r}")
    return Call(call["name"], arguments)
