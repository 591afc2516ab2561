"""Keeps mlx-lm's generation thread going when something of a request raises.

Invariant: what a sampler or a logits processor raises ends the request that it belongs
to and no other. Nothing tells whose fault it is when a forward pass raises, so that
ends all that are being decoded, and not the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableSet
from queue import Queue
from typing import Any

from ._errors import during_generation
from ._guard import guard_processors, guard_sampler


def admit(generator: Any, request: Any) -> Any:
    """A request that is taken from the line, None if nobody waits for it any more."""
    if request is None:
        return None
    inbox, _, arguments = request
    # All ranks have to serve the same requests.
    if getattr(inbox, "is_closed", False) and not generator._is_distributed:
        return None
    generator.state.waiting.add(inbox)
    arguments.inbox = inbox
    return request


def guard_sequences(options: dict[str, Any], arguments: Any) -> None:
    """Let what a sequence's sampler and logits processors raise end its request.

    Whoever waits for the request's reply then stops it, which frees its row.

    Args:
        options (dict): Arguments of ``insert_segments``; changed in place.
        arguments (Arguments): The arguments of the request.
    """
    report = arguments.inbox.put
    if samplers := options.get("samplers"):
        options["samplers"] = [guard_sampler(each, report) for each in samplers]
    if processors := options.get("logits_processors"):
        options["logits_processors"] = [
            guard_processors(each, report) for each in processors
        ]


def run_again(generator: Any, loop: Callable[[], None]) -> None:
    """Run the loop; when it breaks, fail the requests that were in it and go on.

    Raises:
        Exception: What broke the loop, if no request can have been the reason.
    """
    waiting = generator.state.waiting
    while True:
        try:
            return loop()
        except Exception as exc:
            if generator._is_distributed or not waiting:
                raise
            logging.exception("%s requests ended by an exception", len(waiting))
            _fail_all(waiting, exc)


def _fail_all(waiting: MutableSet[Queue[Any]], exc: Exception) -> None:
    """End requests with an error, each with one of its own.

    An exception gains a traceback in every thread that raises it.
    """
    for queue in list(waiting):
        queue.put(during_generation(exc))
        waiting.discard(queue)
