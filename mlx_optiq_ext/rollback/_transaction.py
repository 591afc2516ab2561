"""A forward pass over a cache as a transaction: keep only the rows that were accepted.

Invariant: after ``keep(n)`` every entry holds what it held at the start plus the first
``n`` rows of the pass, whichever entries the pass had reached when it ended. ``keep``
may be called again with a smaller number. Keeping all rows costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, Protocol

from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from .._errors import SpeculationError
from ._tape import Tape

Forward = Callable[[int], Any]

MAX_ROWS = 128  # of a pass, more than any is made of


class Mark(Protocol):
    """How one cache entry stood before a pass."""

    def keep(self, num_rows: int) -> None: ...


class _OffsetMark:
    """Append-only entries: the rows past the offset are never read."""

    def __init__(self, entry: Any):
        self._entry = entry
        self._offset = entry.offset

    def keep(self, num_rows: int) -> None:
        num_rejected = self._entry.offset - self._offset - num_rows
        # Not every pass gets as far as this entry.
        if num_rejected > 0:
            self._entry.trim(num_rejected)


class _ConcatenateMark:
    """Upstream's ``trim`` of this entry moves the offset and leaves the rows."""

    def __init__(self, entry: ConcatenateKVCache):
        self._entry = entry
        self._offset = entry.offset
        self._was_empty = entry.empty()

    def keep(self, num_rows: int) -> None:
        entry, num_kept = self._entry, self._offset + num_rows
        entry.offset = num_kept
        if self._was_empty and num_rows == 0:
            entry.keys = entry.values = None
        elif entry.keys is not None:
            entry.keys = entry.keys[..., :num_kept, :]
            entry.values = entry.values[..., :num_kept, :]


def _rotating_mark(entry: RotatingKVCache) -> Mark:
    # As long as it is not full, a ring is an append-only entry.
    is_empty = entry.keys is None
    if is_empty or entry.offset + MAX_ROWS > entry.max_size:
        return _RotatingMark(entry)
    return _OffsetMark(entry)


class _RotatingMark:
    """A ring buffer, whose ``trim`` upstream is wrong once it has wrapped.

    A pass over several rows leaves the buffer in temporal order with the new rows last,
    so the rejected ones are its tail, and at least ``max_size`` older ones remain.
    """

    def __init__(self, entry: RotatingKVCache):
        self._entry = entry
        self._offset, self._index = entry.offset, entry._idx
        # Handles of their own: an update in place changes the array of the entry, and
        # copies it as long as there is another handle.
        self._keys, self._values = (
            None if array is None else array[...]
            for array in (entry.keys, entry.values)
        )

    def keep(self, num_rows: int) -> None:
        entry = self._entry
        num_rejected = entry.offset - self._offset - num_rows
        if num_rejected <= 0:
            return
        if num_rows == 0:
            entry.keys, entry.values = self._keys, self._values
            entry.offset, entry._idx = self._offset, self._index
            return
        entry.keys = entry.keys[..., :-num_rejected, :]
        entry.values = entry.values[..., :-num_rejected, :]
        entry.offset -= num_rejected
        entry._idx -= num_rejected


class RecurrentMark:
    """States that cannot be cut, only put back or computed again."""

    def __init__(self, entry: ArraysCache):
        self.entry = entry
        self._state = list(entry.cache), entry.left_padding, entry.lengths

    def keep(self, num_rows: int) -> None:
        states, self.entry.left_padding, self.entry.lengths = self._state
        self.entry.cache = list(states)


@singledispatch
def marks(entry: Any) -> list[Mark]:
    """Marks of an entry and of the entries in it."""
    raise SpeculationError(
        f"Cannot speculate: a prompt cache entry is a {type(entry).__name__}, which "
        "cannot be rolled back."
    )


@marks.register(KVCache)
@marks.register(QuantizedKVCache)
@marks.register(ChunkedKVCache)
def _(entry: Any) -> list[Mark]:
    return [_OffsetMark(entry)]


@marks.register
def _(entry: ConcatenateKVCache) -> list[Mark]:
    return [_ConcatenateMark(entry)]


@marks.register
def _(entry: RotatingKVCache) -> list[Mark]:
    return [_rotating_mark(entry)]


@marks.register
def _(entry: ArraysCache) -> list[Mark]:
    return [RecurrentMark(entry)]


@marks.register
def _(entry: CacheList) -> list[Mark]:
    return [mark for inner in entry.caches for mark in marks(inner)]


class Transaction:
    """One forward pass over a cache, of which some rows may be taken back.

    Args:
        cache (Sequence[Any]): The entries that the pass updates.
        tape (Tape, optional): Records the recurrence of the pass. Without one, a pass
            over recurrent entries is cut by running the model again on the rows kept.

    Raises:
        SpeculationError: If an entry is of a type that cannot be rolled back.
    """

    def __init__(self, cache: Sequence[Any], tape: Tape | None = None):
        self._marks = [mark for entry in cache for mark in marks(entry)]
        self._recurrent = [m for m in self._marks if isinstance(m, RecurrentMark)]
        self._tape = tape if self._recurrent else None
        self._num_rows = 0

    def run(self, forward: Forward, num_rows: int) -> Any:
        """Call ``forward(num_rows)``, which makes the pass over its first rows.

        There may be at most ``MAX_ROWS`` of them.
        """
        self._forward = forward
        self._num_rows = self._num_kept = num_rows
        # A single row is kept or not, and needs no tape for either.
        if self._tape is None or num_rows == 1:
            return forward(num_rows)
        with self._tape.recording():
            return forward(num_rows)

    def keep(self, num_rows: int) -> None:
        """Take back every row after the first ``num_rows``."""
        if self._num_rows and num_rows == self._num_kept:
            return
        self._num_kept = num_rows
        entries = [mark.entry for mark in self._recurrent]
        tape = self._tape if self._tape and self._tape.has_all(len(entries)) else None
        must_run_again = num_rows > 0 and len(entries) > 0 and tape is None
        for mark in self._marks:
            mark.keep(0 if must_run_again else num_rows)
        if must_run_again:
            self._forward(num_rows)
        elif num_rows and tape is not None:
            tape.replay(entries, num_rows)
