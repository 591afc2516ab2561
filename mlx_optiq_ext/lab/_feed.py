"""What pages are told as it happens, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

Event = tuple[str, Any]

# A page that is so far behind is cut off; it connects again and gets the whole state.
MAX_PENDING = 2000
# Comments in between tell both ends that the other is there.
KEEP_ALIVE_SECONDS = 15.0


class Feed:
    """Passes events on to every page that listens."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._is_closed = False

    def publish(self, name: str, data: Any) -> None:
        """Tell all pages something.

        Args:
            name (str): Of the event.
            data: That JSON can express.
        """
        for queue in list(self._queues):
            if queue.qsize() >= MAX_PENDING:
                self._queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait((name, data))

    def close(self) -> None:
        """End the streams of all pages, and of those to come."""
        self._is_closed = True
        for queue in self._queues:
            queue.put_nowait(None)
        self._queues.clear()

    async def stream(
        self, snapshot: Callable[[], Iterable[Event]]
    ) -> AsyncIterator[bytes]:
        """The events for one page, after those that tell what is already so.

        Args:
            snapshot (Callable): Returns the latter; called when the page listens, so
              that nothing can change in between.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            for event in list(snapshot()):
                yield encode(*event)
            while not self._is_closed:
                try:
                    item = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if item is None:
                    return
                yield encode(*item)
        finally:
            self._queues.discard(queue)


def encode(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), as_json(data))


def as_json(data: Any) -> bytes:
    """Data as browsers read it: numbers that JSON does not have are null.

    All characters are ASCII, for names of files may have some that are not Unicode.
    """
    try:
        return json.dumps(data, allow_nan=False).encode()
    except ValueError:
        finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
        return json.dumps(finite).encode()
