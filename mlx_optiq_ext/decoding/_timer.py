"""Times rounds, and tells which of them were delayed by something else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# The usual pause between two rounds is found among this many latest ones.
NUM_PAUSES = 16
# The pause of this rank, in ascending order, is the usual one. The rank is low, so that
# a burst of longer pauses does not reach it.
USUAL_RANK = 3
# A pause of at most this share of a round does not matter, however unusual it is.
MAX_SHARE = 0.1


class RoundTimer:
    """Measures the time from one round to the next.

    Between two rounds the consumer of the tokens handles them, mostly while the device
    works on. A pause that is much longer than usual means that something else happened:
    the prompt of another sequence was processed, or nobody asked for more tokens. The
    time of such a round says nothing about its depth.

    Args:
        clock (Callable): Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._last_lap: float | None = None
        self._paused_at = self._pause = 0.0
        self._pauses: deque[float] = deque(maxlen=NUM_PAUSES)

    def lap(self) -> tuple[float | None, bool]:
        """Take the time at the end of a round.

        Returns:
            tuple[float | None, bool]: The seconds since the end of the round before,
            None if there was none; and whether nothing else took up that time.
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
        """Take the time at which the tokens of a round are handed out."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Take the time at which the next token is asked for."""
        self._pause += self._clock() - self._paused_at

    def _usual_pause(self) -> float:
        return sorted(self._pauses)[USUAL_RANK] if len(self._pauses) > USUAL_RANK else 0
