"""A forward pass over a cache as a transaction: keep only the rows that were accepted.

Invariant: after ``keep(n)`` every entry holds what it held at the start plus the first
``n`` rows of the pass, whichever entries the pass had reached when it ended. ``keep``
may be called again with a smaller number. Until it is called, nobody else may read the
entries: some of them are written only then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, singledispatch
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
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
from ._apart import apart
from ._recurrence import Tape
from ._ring import SlotOrderRing

Forward = Callable[[list[Any], int], Any]

# These modules of mlx-lm compute attention themselves, so they do not call the patched
# function that gives every row its own view of a ring.
_OWN_ATTENTION = {"gear", "gemma2", "olmo"}


class Part(Protocol):
    """One cache entry in a transaction: the entry to feed, and how to keep its rows."""

    @property
    def entry(self) -> Any: ...

    def keep(self, num_rows: int) -> None: ...


class _Appended:
    """An append-only entry, whose rows past the offset are never read."""

    def __init__(self, entry: Any):
        self.entry = entry
        self._offset = entry.offset

    def keep(self, num_rows: int) -> None:
        num_rejected = self.entry.offset - self._offset - num_rows
        # A pass that was interrupted may not have reached this entry.
        if num_rejected > 0:
            self.entry.trim(num_rejected)


class _Concatenated:
    """An entry whose rows are cut here, as its own ``trim`` moves the offset only."""

    def __init__(self, entry: ConcatenateKVCache):
        self.entry = entry
        self._offset = entry.offset
        self._was_empty = entry.empty()

    def keep(self, num_rows: int) -> None:
        entry, num_kept = self.entry, self._offset + num_rows
        entry.offset = num_kept
        if self._was_empty and num_rows == 0:
            entry.keys = entry.values = None
        elif entry.keys is not None:
            entry.keys = entry.keys[..., :num_kept, :]
            entry.values = entry.values[..., :num_kept, :]


class _Recurrent:
    """A recurrent state, which cannot be cut but only restored or computed again."""

    def __init__(self, entry: ArraysCache):
        self.entry = entry
        self._state = list(entry.cache), entry.left_padding, entry.lengths

    def keep(self, num_rows: int) -> None:
        """Do nothing, because the transaction sets the states of all such entries."""

    def restore(self) -> None:
        states, self.entry.left_padding, self.entry.lengths = self._state
        self.entry.cache = list(states)


class _Listed:
    """An entry that consists of other entries."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.entry = CacheList(*(part.entry for part in parts))

    def keep(self, num_rows: int) -> None:
        for part in self.parts:
            part.keep(num_rows)


@singledispatch
def _part(entry: Any, shared: dict[Any, mx.array]) -> Part:
    """Make the part that an entry has in a transaction.

    Args:
        entry (Any): An entry of a prompt cache.
        shared (dict): Arrays that the rings of one pass have in common.

    Raises:
        SpeculationError: If entries of this type cannot be rolled back.
    """
    raise SpeculationError(
        f"Cannot speculate: a prompt cache entry is a {type(entry).__name__}, which "
        "cannot be rolled back."
    )


@_part.register(KVCache)
@_part.register(QuantizedKVCache)
@_part.register(ChunkedKVCache)
def _(entry: Any, shared: dict[Any, mx.array]) -> Part:
    return _Appended(entry)


@_part.register
def _(entry: ConcatenateKVCache, shared: dict[Any, mx.array]) -> Part:
    return _Concatenated(entry)


@_part.register
def _(entry: RotatingKVCache, shared: dict[Any, mx.array]) -> Part:
    return SlotOrderRing(entry, shared)


@_part.register
def _(entry: ArraysCache, shared: dict[Any, mx.array]) -> Part:
    return _Recurrent(entry)


@_part.register
def _(entry: CacheList, shared: dict[Any, mx.array]) -> Part:
    return _Listed([_part(inner, shared) for inner in entry.caches])


def _all_parts(parts: Sequence[Part]) -> list[Part]:
    """List the parts with every nested entry replaced by the parts in it."""
    found: list[Part] = []
    for part in parts:
        found += _all_parts(part.parts) if isinstance(part, _Listed) else [part]
    return found


def check_entries(entries: Sequence[Any], model: nn.Module | None = None) -> None:
    """Check that passes of a model over entries can be rolled back.

    Args:
        entries (Sequence[Any]): The model's prompt cache.
        model (nn.Module, optional): The model that reads the entries. Without it, only
          the types of the entries are checked.

    Raises:
        SpeculationError: If an entry is of a type that cannot be rolled back, or if the
            model reads a ring in a way that cannot be kept in the order of its slots.
    """
    parts = _all_parts([_part(entry, {}) for entry in entries])
    has_rings = any(isinstance(part, SlotOrderRing) for part in parts)
    if model is None or not has_rings:
        return
    modules = {type(module).__module__ for module in model.modules()}
    for name in sorted(_OWN_ATTENTION):
        if f"mlx_lm.models.{name}" in modules:
            raise SpeculationError(
                f"Cannot speculate: a prompt cache entry is a RotatingKVCache, and "
                f"models of type {name} read it in a way of their own."
            )


class Transaction:
    """One forward pass over a cache, of which some rows may be taken back.

    Args:
        cache (Sequence[Any]): The entries that the pass updates.
        tape (Tape, optional): The tape that records the recurrence of the pass. Without
            one, a pass over recurrent entries is cut by running the model again on the
            rows that are kept.

    Raises:
        SpeculationError: If an entry is of a type that cannot be rolled back.
    """

    def __init__(self, cache: Sequence[Any], tape: Tape | None = None):
        shared: dict[Any, mx.array] = {}
        self._parts = [_part(entry, shared) for entry in cache]
        self._recurrent = [
            part for part in _all_parts(self._parts) if isinstance(part, _Recurrent)
        ]
        self._tape = tape if self._recurrent else None
        self._num_rows = self._num_kept = 0

    def run(self, forward: Forward, num_rows: int) -> Any:
        """Run the pass over the cache.

        Args:
            forward (Callable): A function of the entries to use in place of those of
                the cache and of a number of rows; it feeds the first rows to the model.
                It may be called again by ``keep``.
            num_rows (int): How many rows the pass has.

        Returns:
            What ``forward`` returns.
        """
        entries = [part.entry for part in self._parts]
        self._forward = partial(forward, entries)
        self._num_rows = self._num_kept = num_rows
        tape = self._tape
        if tape is None or (num_rows == 1 and not tape.is_needed_for_one_row):
            return self._run(num_rows)
        with tape.recording():
            return self._run(num_rows)

    def keep(self, num_rows: int) -> None:
        """Roll back every row after the first ones.

        Args:
            num_rows (int): How many rows of the pass to keep, not more than before.
        """
        is_changed = self._recurrent and num_rows != self._num_kept
        self._num_kept = num_rows
        if not is_changed:
            self._keep(num_rows)
            return
        for part in self._recurrent:
            part.restore()
        entries = [part.entry for part in self._recurrent]
        if num_rows == 0:
            self._keep(0)
        elif self._tape is not None and self._tape.has_all(len(entries)):
            self._keep(num_rows)
            self._tape.replay(entries, num_rows)
        else:
            self._keep(0)
            self._run(num_rows)
            self._keep(num_rows)

    def settle(self) -> None:
        """Let entries own their states, which may be parts of those after every row."""
        for part in self._recurrent if self._tape and self._tape.rows else []:
            states = part.entry.cache
            part.entry.cache = [x if x is None else mx.contiguous(x) for x in states]

    def _run(self, num_rows: int) -> Any:
        with apart():
            return self._forward(num_rows)

    def _keep(self, num_rows: int) -> None:
        for part in self._parts:
            part.keep(num_rows)
