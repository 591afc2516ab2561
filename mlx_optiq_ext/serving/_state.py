"""What a server remembers from one request to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import Queue
from typing import Any
from weakref import WeakSet

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
