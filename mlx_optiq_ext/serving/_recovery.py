"""Keeps mlx-lm's generation thread going when a request breaks its loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ._errors import ClientGone
from ._exchange import is_abandoned
from ._state import state_of


def admit(generator: Any, request: Any) -> Any:
    """A request that is taken from the line, None if nobody waits for it any more."""
    if request is None:
        return None
    queue = request[0]
    # All ranks have to serve the same requests.
    if is_abandoned(queue) and not generator._is_distributed:
        queue.put(ClientGone("the client left before its turn"))
        return None
    state_of(generator).waiting.add(queue)
    return request


def run_again(generator: Any, loop: Callable[[], None]) -> None:
    """Run the loop; when it breaks, fail the requests that were in it and go on.

    Raises:
        Exception: What broke the loop, if no request can have been the reason.
    """
    waiting = state_of(generator).waiting
    while True:
        try:
            return loop()
        except Exception as exc:
            if generator._is_distributed or not waiting:
                raise
            logging.exception("%s requests ended by an exception", len(waiting))
            failure = exc.with_traceback(None)
        for queue in list(waiting):
            queue.put(failure)
        waiting.clear()
        del failure
