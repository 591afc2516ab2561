"""Generates the reply to a request and sends it, streamed or in one piece."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ._errors import APIError, ClientGone
from ._events import Event, Usage
from ._exchange import Exchange
from ._explain import explain
from ._generation import Generation
from ._request import Request

Body = dict[str, Any]


class Reply(Protocol):
    """Writes a reply in the words of one API."""

    def start(self) -> Iterator[Body]: ...

    def feed(self, event: Event) -> Iterator[Body]: ...

    def finish(self) -> Iterator[Body | str]:
        """The end, after the events of all choices."""
        ...

    def failure(self, error: APIError) -> Iterator[Body]: ...

    def keep_alive(self) -> Body | None: ...

    def result(self) -> Body: ...


def send_reply(
    exchange: Exchange,
    request: Request,
    reply: Reply,
    usage: Usage,
    keep: Callable[[Body], None] = lambda body: None,
) -> None:
    """Generate a reply and send it.

    Args:
        exchange (Exchange): Whom to send it to.
        request (Request): What to generate it from.
        reply (Reply): Writes it.
        usage (Usage): Counts its tokens.
        keep (Callable): Called with the whole of it when it is complete.

    Raises:
        APIError: If it failed before anything was sent.
    """
    generation = Generation(exchange, request, usage)
    if request.is_streamed:
        exchange.open_stream(reply)
    try:
        for body in write_reply(generation, reply, keep):
            if request.is_streamed:
                exchange.send_event(body)
    except ClientGone:
        raise
    except Exception as exc:
        _fail(exchange, reply, exc)
    else:
        if not request.is_streamed:
            exchange.send_json(200, reply.result())


def write_reply(
    generation: Generation, reply: Reply, keep: Callable[[Body], None]
) -> Iterator[Body | str]:
    """The events of a reply while it is generated."""
    has_started = False
    for event in generation.events():
        if not has_started:
            has_started = True
            yield from reply.start()
        yield from reply.feed(event)
    # A client that has the end may ask for the whole at once, so that is kept first.
    last = list(reply.finish())
    keep(reply.result())
    yield from last


def _fail(exchange: Exchange, reply: Reply, exc: Exception) -> None:
    error = explain(exchange, exc)
    if error.status >= 500:
        unexpected = None if exc is error else exc
        logging.error("%s: %s", exchange.place, error.message, exc_info=unexpected)
    if not exchange.is_started:
        raise error from exc
    for body in reply.failure(error):
        exchange.send_event(body)
