"""How long rounds take, and whether that is their own doing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

NUM_PAUSES = 16  # latest times outside of the loop, of which the usual one is known
USUAL_RANK = 3  # among them, ascending: a burst of longer ones does not reach it
MAX_SHARE = 0.1  # of a round, that may be spent outside whatever is usual


class RoundTimer:
    """Measures the time from one round to the next.

    Between two rounds whoever consumes the tokens does something with them, most of it
    while the device works on. Much longer than usual means that it did something else:
    the prompt of another sequence was processed, or nobody asked for more tokens. The
    time of such a round is not that of its kind.

    Args:
        clock (Callable): Tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._last_lap: float | None = None
        self._paused_at = self._pause = 0.0
        self._pauses: deque[float] = deque(maxlen=NUM_PAUSES)

    def lap(self) -> tuple[float | None, bool]:
        """A round is over.

        Returns:
            tuple[float | None, bool]: Seconds since the round before, None if there was
            none, and whether nothing else took any of them.
        """
        now, before = self._clock(), self._last_lap
        self._last_lap = now
        if before is None:
            return None, False
        pause, self._pause = self._pause, 0.0
        usual = self._usual_pause()
        self._pauses.append(pause)
        seconds = now - before
        return seconds, pause <= max(2 * usual, MAX_SHARE * seconds)

    def pause(self) -> None:
        """The tokens of a round are handed out."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        """The next round is asked for."""
        self._pause += self._clock() - self._paused_at

    def _usual_pause(self) -> float:
        return sorted(self._pauses)[USUAL_RANK] if len(self._pauses) > USUAL_RANK else 0
