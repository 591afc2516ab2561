"""What a server remembers from one request to the next."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import Queue
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from ._metrics import Metrics, make_metrics
from ._store import ResponseStore


@dataclass
class ServerState:
    """The state that goes with one of mlx-lm's response generators.

    Args:
        store: Responses that can be asked for again.
        waiting: The queues on which requests that are being served get their reply.
        metrics: Counters of all requests, None if prometheus-client is missing.
        exchanges: The exchanges for which something is being generated.
    """

    store: ResponseStore = field(default_factory=ResponseStore)
    waiting: WeakSet[Queue[Any]] = field(default_factory=WeakSet)
    metrics: Metrics | None = field(default_factory=make_metrics)
    exchanges: set[Any] = field(default_factory=set)


_states: WeakKeyDictionary[Any, ServerState] = WeakKeyDictionary()
_lock = threading.Lock()


def state_of(generator: Any) -> ServerState:
    """The state of a generator, made when it is asked for the first time."""
    with _lock:
        state = _states.get(generator)
        if state is None:
            state = _states[generator] = ServerState()
        return state
