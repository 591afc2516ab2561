"""Keeps responses for `GET /v1/responses/{id}` and `previous_response_id`."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

Body = dict[str, Any]

MAX_BYTES = 32 << 20
MAX_AGE = 24 * 60 * 60.0


class Stored(NamedTuple):
    """A response, and the items that it was based on."""

    response: Body
    items: list[Body]

    @property
    def history(self) -> list[Body]:
        """What a request that continues it has to begin with."""
        return [*self.items, *self.response["output"]]


class _Entry(NamedTuple):
    text: str
    deadline: float
    item_ids: frozenset[str]


class ResponseStore:
    """A store of bounded size; what was not used for longest goes first.

    Args:
        max_bytes (int): Size of all that is kept, as JSON.
        max_age (float): Seconds for which a response is kept.
        clock (Callable): Tells the time in seconds.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        max_age: float = MAX_AGE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # The responses that an item is in, by its id, the newest last.
        self._holders: dict[str, dict[str, None]] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, stored: Stored) -> None:
        # ASCII, so that its length is its size.
        ids = frozenset(
            item_id
            for item in stored.history
            if isinstance(item_id := item.get("id"), str)
        )
        entry = _Entry(json.dumps(stored), self._clock() + self._max_age, ids)
        response_id = stored.response["id"]
        with self._lock:
            self._discard(response_id)
            self._entries[response_id] = entry
            self._num_bytes += len(entry.text)
            for item_id in ids:
                self._holders.setdefault(item_id, {})[response_id] = None
            while self._num_bytes > self._max_bytes:
                self._discard(next(iter(self._entries)))
            self._drop_old()

    def get(self, response_id: str) -> Stored | None:
        """A copy of what is kept under an id, None if there is nothing."""
        with self._lock:
            self._drop_old()
            entry = self._entries.get(response_id)
            if entry is None:
                return None
            self._entries.move_to_end(response_id)
        return Stored(*json.loads(entry.text))

    def find_item(self, item_id: str) -> Body | None:
        """A copy of an item of any response, None if it is not there."""
        with self._lock:
            self._drop_old()
            holders = self._holders.get(item_id)
            if holders is None:
                return None
            text = self._entries[next(reversed(holders))].text
        history = Stored(*json.loads(text)).history
        return next(item for item in history if item.get("id") == item_id)

    def remove(self, response_id: str) -> bool:
        """Forget a response; whether there was one."""
        with self._lock:
            self._drop_old()
            return self._discard(response_id)

    def _discard(self, response_id: str) -> bool:
        entry = self._entries.pop(response_id, None)
        if entry is None:
            return False
        self._num_bytes -= len(entry.text)
        for item_id in entry.item_ids:
            self._holders[item_id].pop(response_id)
            if not self._holders[item_id]:
                del self._holders[item_id]
        return True

    def _drop_old(self) -> None:
        now = self._clock()
        old = [name for name, entry in self._entries.items() if entry.deadline < now]
        for name in old:
            self._discard(name)
