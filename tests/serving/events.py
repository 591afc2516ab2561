"""Replies as the reader of them makes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_optiq_ext.serving._events import Call, CallPiece, CallStart, Event

Body = dict[str, Any]


def written(events: Iterable[Event]) -> Iterator[Event]:
    """Events with what comes before each call."""
    for event in events:
        if isinstance(event, Call):
            yield CallStart(event.name)
            yield CallPiece(json.dumps(event.arguments))
        yield event


def bodies_of(reply: Any, events: Iterable[Event]) -> list[Body]:
    """All that a reply sends of some events, as a client reads it."""
    bodies = [*reply.start()]
    for event in written(events):
        bodies += json.loads(json.dumps([*reply.feed(event)]))
    return bodies + json.loads(json.dumps([*reply.finish()]))
