"""Writes replies in the form that chat completions and completions share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from .._errors import APIError, openai_body
from .._events import Choice, End, Event, Token, Usage
from .._exchange import Exchange
from .._logprobs import logprob_entry
from .._models import DEFAULT_MODEL
from .._request import Request
from .._speculation import timings

Body = dict[str, Any]

FINISH_REASONS = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "context": "length",
}
DONE = "[DONE]"


class CompletionReply:
    """Turns events into the pieces of a reply, and into the whole of it.

    Args:
        exchange (Exchange): Whom it is for.
        request (Request): What was asked for.
        usage (Usage): Counted by whoever makes the events.
    """

    PREFIX: str
    KIND: str
    PIECE_KIND: str

    def __init__(self, exchange: Exchange, request: Request, usage: Usage):
        self._request = request
        self._usage = usage
        self._choices: list[Body] = []
        # Tokens that no piece has been sent for yet.
        self._tokens: list[Token] = []
        self._sources: list[Body] = []
        self._head = {
            "id": f"{self.PREFIX}-{uuid.uuid4()}",
            "system_fingerprint": exchange.handler.system_fingerprint,
            "object": self.PIECE_KIND if request.is_streamed else self.KIND,
            "model": request.model or DEFAULT_MODEL,
            "created": exchange.handler.created,
        }

    def begin(self) -> Body:
        """The fields of a choice of which nothing is known yet."""
        raise NotImplementedError

    def write(self, choice: Body, event: Event) -> Body | None:
        """Add an event to a choice.

        Returns:
            dict: The fields of a piece that adds the same, None if it adds nothing.
        """
        raise NotImplementedError

    def end(self, choice: Body, end: End) -> Body:
        """The fields of the last piece of a choice, which is complete now."""
        raise NotImplementedError

    def logprobs(self, choice: Body, tokens: list[Token]) -> Body:
        """What a piece of a choice says of its tokens."""
        return {"content": [logprob_entry(token) for token in tokens]}

    def start(self) -> Iterator[Body]:
        return iter(())

    def feed(self, event: Event) -> Iterator[Body]:
        if isinstance(event, Choice):
            fields = {"index": event.index, "finish_reason": None}
            self._choices.append(fields | self.begin())
            return
        choice = self._choices[-1]
        if isinstance(event, Token):
            self._tokens.append(event)
        elif isinstance(event, End):
            last = self._piece(choice, self.end(choice, event))
            yield last | timings(self._usage)
        elif (piece := self.write(choice, event)) is not None:
            yield self._piece(choice, piece)

    def finish(self) -> Iterator[Body | str]:
        options = self._request.body.get("stream_options") or {}
        if options.get("include_usage"):
            yield {
                **self._head,
                "choices": [],
                "usage": self._usage_body(),
                **timings(self._usage),
            }
        yield DONE

    def failure(self, error: APIError) -> Iterator[Body]:
        yield openai_body(error)

    def keep_alive(self) -> None:
        """The API has no piece that says nothing: a comment keeps a stream alive."""

    def result(self) -> Body:
        """The whole reply, once the ends of all choices were fed."""
        body = {
            **self._head,
            "choices": self._choices,
            "usage": self._usage_body(),
            **timings(self._usage),
        }
        if self._request.gives_sources:
            body["token_sources"] = self._sources
        return body

    def _piece(self, choice: Body, fields: Body) -> Body:
        tokens, self._tokens = self._tokens, []
        piece = {"index": choice["index"], "finish_reason": choice["finish_reason"]}
        if self._request.gives_logprobs:
            piece["logprobs"] = self.logprobs(choice, tokens)
            known = choice["logprobs"]
            for name, values in piece["logprobs"].items():
                known[name] = known.get(name, []) + values
        body = {**self._head, "choices": [piece | fields]}
        if self._request.gives_sources:
            sources = [{"text": t.text, "source": t.source} for t in tokens]
            self._sources += sources
            body["token_sources"] = sources
        return body

    def _usage_body(self) -> Body:
        usage = self._usage
        body: Body = {
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": usage.num_output_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        }
        if usage.stats:
            num_drafted = sum(stats.num_drafted for stats in usage.stats)
            num_accepted = sum(stats.num_accepted for stats in usage.stats)
            body["completion_tokens_details"] = {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_drafted - num_accepted,
            }
        return body
