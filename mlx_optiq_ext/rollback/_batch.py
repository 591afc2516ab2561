"""Cache entries of several sequences, each at an offset of its own.

Sequences are padded on the right: the rows of each stand where they would stand alone.
So sums are taken in the order of plain decoding, and behind a sequence there is nothing
but rows that are masked.

Invariant: between passes, ``offsets[i]`` rows of sequence ``i`` count. What is behind
them is never read, and what is before them is what plain decoding would have computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from .._errors import SpeculationError
from ._recurrence import (
    NUM_ROW_INPUTS,
    Tape,
    has_known_recurrence,
    prepare_recurrence,
)

STEP = 256  # rows by which the arrays grow, as in mlx-lm's KVCache
MASK_POSITION = 8  # of gated_delta_update's arguments

Forward = Callable[[list[Any], int], Any]


class Offsets:
    """How many tokens each sequence of a batch holds.

    ``known`` are the numbers on the host. The array that passes read is made of them.
    """

    def __init__(self) -> None:
        self.known: list[int] = []
        self._array: mx.array | None = None

    def set(self, numbers: Sequence[int]) -> None:
        self.known, self._array = list(numbers), None

    @property
    def array(self) -> mx.array:
        if self._array is None:
            self._array = mx.array(self.known, mx.int32)
        return self._array


class BatchKV:
    """Keys and values of full attention, as mlx-lm's models use an entry.

    Args:
        offsets (Offsets): Of the batch, which moves them on after a pass.
    """

    def __init__(self, offsets: Offsets):
        self._offsets = offsets
        self._num_sequences = 0
        self.keys: Any = None
        self.values: Any = None

    @property
    def offset(self) -> mx.array:
        """The position of the next row of each sequence, ``[num_sequences]``."""
        return self._offsets.array

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        return [x for x in (self.keys, self.values) if x is not None]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """What each new row sees, ``[num_sequences, 1, N, num_rows]``."""
        rows = self._offsets.array[:, None] + mx.arange(N)
        slots = mx.arange(max(self._offsets.known) + N)
        mask = slots <= rows[..., None]
        if window_size is not None:
            mask = mask & (slots > rows[..., None] - window_size)
        return mask[:, None]

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        num_rows = max(self._offsets.known) + keys.shape[2]
        self._reserve(num_rows, keys, values)
        self.keys = self._write(self.keys, keys)
        self.values = self._write(self.values, values)
        return self.keys[..., :num_rows, :], self.values[..., :num_rows, :]

    def join(self, entry: KVCache) -> None:
        self._num_sequences += 1
        if entry.keys is None:
            if self.keys is not None:
                self.keys, self.values = map(_with_another, (self.keys, self.values))
            return
        keys, values = entry.keys_and_values()
        if self.keys is None:
            # Those before it are empty, and are allocated now.
            self._reserve(1, keys, values, self._num_sequences - 1)
        capacity = max(self.keys.shape[2] if self.keys is not None else 0, STEP)
        size = -(-max(capacity, keys.shape[2]) // STEP) * STEP
        pairs = ((self.keys, keys), (self.values, values))
        self.keys, self.values = (
            _stacked(mine, _padded(new, size), size) for mine, new in pairs
        )

    def extract(self, index: int, num_tokens: int) -> KVCache:
        entry = KVCache()
        if num_tokens and self.keys is not None:
            rows = slice(index, index + 1), slice(None), slice(num_tokens)
            entry.keys, entry.values = self.keys[rows], self.values[rows]
            entry.offset = num_tokens
        return entry

    def filter(self, indices: mx.array) -> None:
        self._num_sequences = indices.size
        if self.keys is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def _reserve(
        self,
        num_rows: int,
        keys: mx.array,
        values: mx.array,
        num_sequences: int | None = None,
    ) -> None:
        size = -(-num_rows // STEP) * STEP
        if self.keys is not None:
            self.keys, self.values = (
                _padded(array, size) for array in (self.keys, self.values)
            )
        elif number := num_sequences if num_sequences is not None else keys.shape[0]:
            self.keys, self.values = (
                mx.zeros((number, x.shape[1], size, x.shape[3]), x.dtype)
                for x in (keys, values)
            )

    def _write(self, buffer: Any, rows: mx.array) -> mx.array:
        places = self._offsets.array[:, None] + mx.arange(rows.shape[2])
        places = mx.broadcast_to(places[:, None, :, None], rows.shape)
        return mx.put_along_axis(buffer, places, rows, axis=2)


def _padded(array: mx.array, size: int) -> mx.array:
    missing = max(size - array.shape[2], 0)
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else array


def _stacked(mine: mx.array | None, new: mx.array, size: int) -> mx.array:
    return new if mine is None else mx.concatenate([_padded(mine, size), new])


def _with_another(array: mx.array | None) -> mx.array | None:
    """The array with room for one more sequence."""
    if array is None:
        return None
    return mx.concatenate([array, mx.zeros((1, *array.shape[1:]), array.dtype)])


class BatchStates(ArraysCache):
    """States of a recurrent layer: of its convolution, and of the recurrence."""

    cache: list[mx.array | None]

    def __init__(self) -> None:
        super().__init__(2)

    def join(self, entry: ArraysCache) -> None:
        for slot in range(2):
            new, mine = entry[slot], self[slot]
            if new is None:
                raise SpeculationError("Cannot speculate: a recurrent entry is empty.")
            self[slot] = new if mine is None else mx.concatenate([mine, new])

    def take(self, indices: mx.array) -> None:
        self.cache = [None if x is None else x[indices] for x in self.cache]


class Batch:
    """Cache entries of several sequences, each at an offset of its own.

    Args:
        model (nn.Module, optional): Whose entries they are; None for those of a head,
            which are keys and values only.
    """

    def __init__(self, model: nn.Module | None = None):
        self.entries: list[Any] = []
        self._offsets = Offsets()
        self._before: list[int] = []
        self._num_rows = 0
        self._tape: Tape | None = None
        self._is_recurrent = model is not None and has_known_recurrence(model)
        if model is not None and self._is_recurrent:
            prepare_recurrence(model)

    @property
    def num_sequences(self) -> int:
        return len(self._offsets.known)

    @property
    def offsets(self) -> mx.array:
        """Tokens that each sequence holds, ``[num_sequences]``."""
        return self._offsets.array

    def join(self, cache: Sequence[Any]) -> None:
        """Take in stock entries of one sequence, which are copied.

        Raises:
            SpeculationError: If they cannot be taken in. Nothing is changed then.
        """
        for entry in cache:
            self._check(entry)
        if not self.entries:
            self.entries = [
                BatchKV(self._offsets) if type(entry) is KVCache else BatchStates()
                for entry in cache
            ]
        for mine, entry in zip(self.entries, cache, strict=True):
            mine.join(entry)
        num_tokens = max((getattr(e, "offset", 0) for e in cache), default=0)
        self._offsets.set([*self._offsets.known, num_tokens])

    def run(self, forward: Forward, num_rows: int) -> Any:
        """Call ``forward(entries, num_rows)``, which feeds each sequence so many rows.

        All rows are kept until ``keep`` says otherwise.
        """
        self._before, self._num_rows = self._offsets.known, num_rows
        self._tape = Tape() if self._recurrent else None
        try:
            if self._tape is None:
                return forward(self.entries, num_rows)
            with self._tape.recording():
                return forward(self.entries, num_rows)
        finally:
            self._offsets.set([number + num_rows for number in self._before])

    def keep(self, num_rows: Sequence[int]) -> None:
        """Take back what each sequence has behind its first rows of the last pass."""
        numbers = list(num_rows)
        kept = [n + rows for n, rows in zip(self._before, numbers, strict=True)]
        self._offsets.set(kept)
        if self._recurrent and any(number < self._num_rows for number in numbers):
            rows = mx.array(numbers, mx.int32)
            for entry, replayed in zip(
                self._recurrent, self._replayed(rows), strict=True
            ):
                entry.cache = replayed

    def take_back(self, num_rows: int) -> None:
        """Take back the latest rows of every sequence; there may be no recurrence."""
        self._offsets.set([number - num_rows for number in self._offsets.known])

    def extract(self, index: int, num_tokens: int | None = None) -> list[Any]:
        """Stock entries of one sequence that hold its first tokens.

        Args:
            index (int): The sequence.
            num_tokens (int, optional): At least as many as before the last pass.
                Default: all.
        """
        number = self._offsets.known[index] if num_tokens is None else num_tokens
        states = iter(self._states_of(index, number))
        return [
            entry.extract(index, number) if isinstance(entry, BatchKV) else next(states)
            for entry in self.entries
        ]

    def filter(self, indices: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        if not indices:
            self.entries = []
            self._offsets.set([])
            self._before = []
            return
        order = mx.array(list(indices))
        for entry in self.entries:
            if isinstance(entry, BatchKV):
                entry.filter(order)
            else:
                entry.take(order)
        self._offsets.set([self._offsets.known[index] for index in indices])
        self._before = []

    @property
    def _recurrent(self) -> list[BatchStates]:
        return [entry for entry in self.entries if isinstance(entry, BatchStates)]

    def _check(self, entry: Any) -> None:
        is_known = type(entry) is KVCache or (
            type(entry) is ArraysCache and self._is_recurrent
        )
        if not is_known:
            raise SpeculationError(
                "Cannot speculate for several sequences in one pass: a prompt cache "
                f"entry is a {type(entry).__name__}."
            )

    def _replayed(
        self, num_rows: mx.array, index: int | None = None
    ) -> list[list[mx.array]]:
        """States after the first rows of the last pass, of all sequences or of one."""
        assert self._tape is not None
        one = slice(None) if index is None else slice(index, index + 1)
        recorded = self._tape.recorded(len(self._recurrent))
        found = []
        for conv_input, (update, args, kwargs) in recorded:
            inputs = [x[one] for x in args[:NUM_ROW_INPUTS]]
            num_state_rows = conv_input.shape[1] - inputs[0].shape[1]
            places = num_rows[:, None] + mx.arange(num_state_rows)
            conv = mx.take_along_axis(conv_input[one], places[..., None], axis=1)
            mask = mx.arange(inputs[0].shape[1]) < num_rows[:, None]
            rest = list(args[NUM_ROW_INPUTS:MASK_POSITION])
            rest[-1] = rest[-1][one]
            _, state = update(*inputs, *rest, mask, **kwargs)
            found.append([conv, state])
        return found

    def _states_of(self, index: int, num_tokens: int) -> list[ArraysCache]:
        """Stock entries of the recurrent layers of one sequence."""
        if not self._recurrent:
            return []
        if num_tokens == self._offsets.known[index]:
            rows = slice(index, index + 1)
            kept = [
                [x[rows] for x in entry.cache if x is not None]
                for entry in self._recurrent
            ]
        else:
            number = mx.array([num_tokens - self._before[index]], mx.int32)
            kept = self._replayed(number, index)
        entries = [ArraysCache(2) for _ in kept]
        for entry, arrays in zip(entries, itertools.chain(kept), strict=True):
            entry.cache = [mx.contiguous(array) for array in arrays]
        return entries
