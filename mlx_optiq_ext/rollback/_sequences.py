"""Entries that hold several sequences, as mlx-lm's models use an entry.

Sequences are padded on the right: the rows of each stand where they would stand alone.
So sums are taken in the order of plain decoding, and behind a sequence there is nothing
but rows that are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from .._errors import SpeculationError
from ._rows import RowStates
from ._slots import SlotViews, advanced, rows_in_slots

STEP = 256  # rows by which the arrays grow, as in mlx-lm's KVCache


class Offsets:
    """How many tokens each sequence of a batch holds.

    ``most`` are the numbers on the host. They are too large where the host does not
    know yet how many rows of a pass were kept; those of ``array`` never are.
    """

    def __init__(self) -> None:
        self.most: list[int] = []
        self._array: mx.array | None = None

    def set(self, most: Sequence[int], array: mx.array | None = None) -> None:
        self.most, self._array = list(most), array

    @property
    def array(self) -> mx.array:
        if self._array is None:
            self._array = mx.array(self.most, mx.int32)
        return self._array

    def positions(self, num_rows: int) -> mx.array:
        """Of the next rows, ``[num_sequences, num_rows]``."""
        return self.array[:, None] + mx.arange(num_rows)


class BatchKV:
    """Keys and values of full attention.

    Args:
        offsets (Offsets): Of the batch, which moves them on after a pass.
    """

    stock: type = KVCache

    def __init__(self, offsets: Offsets):
        self._offsets = offsets
        self._num_sequences = 0
        # Arrays of keys, followed by as many of values.
        self._arrays: list[mx.array] = []

    @property
    def offset(self) -> mx.array:
        """The position of the next row of each sequence, ``[num_sequences]``."""
        return self._offsets.array

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def state(self) -> list[mx.array]:
        return self._arrays

    def empty(self) -> bool:
        return not self._arrays

    def check(self, entry: Any) -> None:
        """Raise SpeculationError if a stock entry cannot join."""
        if type(entry) is not self.stock:
            _refuse(
                f"one prompt cache has a {type(entry).__name__} where others have "
                f"a {self.stock.__name__}"
            )

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """What each new row sees, ``[num_sequences, 1, N, num_rows]``."""
        rows = self._offsets.positions(N)[..., None]
        slots = mx.arange(max(self._offsets.most) + N)
        mask = slots <= rows
        if window_size is not None:
            mask = mask & (slots > rows - window_size)
        return mask[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        rows = self._encoded(keys, values)
        num_rows = max(self._offsets.most) + keys.shape[2]
        self._reserve(num_rows, rows)
        self._write(self._offsets.positions(keys.shape[2]), rows)
        self._seen = self._decoded([x[..., :num_rows, :] for x in self._arrays])
        return self._seen

    def keys_and_values(self) -> Any:
        """What the rows of the pass attend to."""
        return self._seen

    def keep(self, num_rows: mx.array, is_all: bool) -> None:
        """Undo what the latest pass wrote behind the first rows of each sequence."""

    def end(self) -> None:
        """Forget the latest pass."""
        self._seen = None

    def visible(self) -> tuple[mx.array, mx.array, mx.array]:
        """Keys and values, ``[num_sequences, heads, slots, head_dim]``, and which of
        them are the sequences', ``[num_sequences, 1, 1, slots]``.
        """
        num_slots = max(self._offsets.most)
        arrays = [x[..., :num_slots, :] for x in self._arrays]
        mask = mx.arange(num_slots) < self._num_held()[:, None]
        return *self._dequantized(arrays), mask[:, None, None]

    def join(self, entry: Any) -> None:
        self._num_sequences += 1
        if entry.keys is None:
            self._arrays = [_with_another(x) for x in self._arrays]
            return
        rows = self._rows_of(entry)
        if not self._arrays and self._num_sequences > 1:
            # Those before it are empty, and are allocated now.
            before = [mx.zeros_like(x[..., :1, :]) for x in rows]
            repeats = self._num_sequences - 1
            self._arrays = [mx.repeat(x, repeats, axis=0) for x in before]
        size = self._size(max(rows[0].shape[2], self._capacity))
        rows = [_padded(x, size) for x in rows]
        if self._arrays:
            pairs = zip(self._arrays, rows, strict=True)
            rows = [mx.concatenate([_padded(mine, size), x]) for mine, x in pairs]
        self._arrays = rows

    def extract(self, index: int, num_tokens: int, num_kept: int | None) -> Any:
        """The stock entry of one sequence with its first tokens.

        Args:
            index (int): The sequence.
            num_tokens (int): How many.
            num_kept (int, optional): How many of them are of the latest pass; None if
                that ended with all that it kept.
        """
        entry = self._new_stock()
        if num_tokens and self._arrays:
            rows = [x[index : index + 1, :, :num_tokens] for x in self._arrays]
            entry.keys, entry.values = self._decoded([mx.contiguous(x) for x in rows])
            entry.offset = num_tokens
        return entry

    def filter(self, indices: mx.array) -> None:
        self._num_sequences = indices.size
        self._arrays = [x[indices] for x in self._arrays]

    @property
    def _capacity(self) -> int:
        return self._arrays[0].shape[2] if self._arrays else 0

    def _size(self, num_rows: int) -> int:
        return -(-num_rows // STEP) * STEP

    def _num_held(self) -> mx.array:
        """Rows of each sequence in the arrays."""
        return self._offsets.array

    def _rows_of(self, entry: Any) -> list[mx.array]:
        return list(entry.keys_and_values())

    def _new_stock(self) -> Any:
        return KVCache()

    def _encoded(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """The arrays that rows are kept in."""
        return [keys, values]

    def _decoded(self, arrays: list[mx.array]) -> Any:
        """Keys and values as mlx-lm's entry returns them."""
        return tuple(arrays)

    def _dequantized(self, arrays: list[mx.array]) -> tuple[mx.array, ...]:
        return tuple(arrays)

    def _reserve(self, num_rows: int, rows: list[mx.array]) -> None:
        """Have room for rows like these."""
        size = self._size(num_rows)
        if self._arrays:
            self._arrays = [_padded(array, size) for array in self._arrays]
        else:
            self._arrays = [
                mx.zeros((*x.shape[:2], size, x.shape[3]), x.dtype) for x in rows
            ]

    def _write(self, slots: mx.array, rows: Sequence[mx.array]) -> None:
        """Put rows ``[num_sequences, heads, num_rows, size]`` into their slots."""
        self._arrays = [
            mx.put_along_axis(x, _places(slots, new), new, axis=2)
            for x, new in zip(self._arrays, rows, strict=True)
        ]


class BatchQuantizedKV(BatchKV):
    """Quantised keys and values of full attention."""

    stock = QuantizedKVCache

    def __init__(self, offsets: Offsets, group_size: int, bits: int):
        super().__init__(offsets)
        self.group_size = group_size
        self.bits = bits

    def check(self, entry: Any) -> None:
        super().check(entry)
        if (entry.group_size, entry.bits) != (self.group_size, self.bits):
            _refuse("their keys and values are quantised differently")

    def _rows_of(self, entry: Any) -> list[mx.array]:
        keys, values = entry.keys_and_values()
        return [*keys, *values]

    def _new_stock(self) -> Any:
        return QuantizedKVCache(self.group_size, self.bits)

    def _encoded(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        options = {"group_size": self.group_size, "bits": self.bits}
        return [*mx.quantize(keys, **options), *mx.quantize(values, **options)]

    def _decoded(self, arrays: list[mx.array]) -> Any:
        return arrays[:3], arrays[3:]

    def _dequantized(self, arrays: list[mx.array]) -> tuple[mx.array, ...]:
        return tuple(
            mx.dequantize(*three, group_size=self.group_size, bits=self.bits)
            for three in self._decoded(arrays)
        )


class BatchRing(BatchKV):
    """Keys and values of a sliding window, in the order of mlx-lm's slots.

    As long as no sequence can be past the window, rows are written behind each other.
    Then a single row is written at once, and several rows are kept back until it is
    known how many of them stay: what they take the place of is still read.
    """

    stock = RotatingKVCache

    def __init__(self, offsets: Offsets, max_size: int, keep: int):
        super().__init__(offsets)
        self.max_size = max_size
        self._num_first = keep  # slots that are never taken again
        # Of each sequence when it joined: its tokens, and the index of its ring.
        self._joined: list[tuple[int, int]] = []
        self.end()

    def check(self, entry: Any) -> None:
        super().check(entry)
        if entry.empty():
            _refuse("a sliding window is empty")
        if (entry.max_size, entry.keep) != (self.max_size, self._num_first):
            _refuse("their sliding windows are of different sizes")

    def end(self) -> None:
        super().end()
        self._rows: list[mx.array] | None = None
        self._saved: list[mx.array] = []
        self._index: Any = None
        self._slots: Any = None

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        if not self._wraps(N):
            return super().make_mask(N, return_array, window_size)
        positions, slots = self._offsets.positions(N)[..., None], mx.arange(
            self.max_size
        )
        num_slots = mx.minimum(positions + 1, self.max_size)
        mask = slots < num_slots
        if window_size is not None and window_size < self.max_size:
            # As mlx-lm's ring masks a single row.
            index = self._advanced(self._ring_index()[:, None], mx.arange(N))[..., None]
            index = mx.where(index >= self.max_size, 0, index)
            age = (index - slots) % num_slots
            mask = mask & ((positions < window_size) | (age < window_size))
        return mask[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        num_rows = keys.shape[2]
        if not self._wraps(num_rows):
            return super().update_and_fetch(keys, values)
        self._reserve(self.max_size, [keys, values])
        self._index = self._ring_index()
        last = self._advanced(self._index[:, None], mx.arange(1, num_rows + 1))
        self._slots = last - 1
        self._saved = [_taken(x, self._slots) for x in self._arrays]
        # They are read before rows are written: else the ring is copied.
        self._rows = mx.depends([keys, values], self._saved)
        if num_rows == 1:
            self._write(self._slots, self._rows)
            self._seen = tuple(self._arrays)
        else:
            self._seen = (self._views(num_rows),) * 2
        return self._seen

    def keep(self, num_rows: mx.array, is_all: bool) -> None:
        if self._rows is None or (is_all and self._slots.shape[1] == 1):
            return
        self._write(self._slots, self._after(num_rows))

    def join(self, entry: Any) -> None:
        index = self.max_size if _surplus(entry) > 0 else entry._idx
        self._joined.append((entry.offset, index))
        super().join(entry)

    def extract(self, index: int, num_tokens: int, num_kept: int | None) -> Any:
        entry = self._new_stock()
        one = slice(index, index + 1)
        arrays = [x[one, :, : min(num_tokens, self.max_size)] for x in self._arrays]
        if self._rows is not None and num_kept is not None:
            kept = self._after(mx.array([num_kept]), one)
            slots = self._slots[one]
            whole = zip([x[one] for x in self._arrays], kept, strict=True)
            arrays = [
                mx.put_along_axis(x, _places(slots, new), new, axis=2)
                for x, new in whole
            ]
            arrays = [x[..., : min(num_tokens, self.max_size), :] for x in arrays]
        entry.keys, entry.values = (mx.contiguous(x) for x in arrays)
        offset, ring_index = self._joined[index]
        entry.offset = num_tokens
        entry._idx = advanced(
            ring_index, num_tokens - offset, self.max_size, self._num_first
        )
        return entry

    def filter(self, indices: mx.array) -> None:
        super().filter(indices)
        self._joined = [self._joined[index] for index in indices.tolist()]

    def visible(self) -> tuple[mx.array, mx.array, mx.array]:
        num_slots = min(max(self._offsets.most), self.max_size)
        keys, values = (x[..., :num_slots, :] for x in self._arrays)
        mask = mx.arange(num_slots) < self._offsets.array[:, None]
        return keys, values, mask[:, None, None]

    def _wraps(self, num_rows: int) -> bool:
        return max(self._offsets.most) + num_rows > self.max_size

    def _size(self, num_rows: int) -> int:
        return min(super()._size(num_rows), self.max_size)

    def _rows_of(self, entry: Any) -> list[mx.array]:
        both = entry.keys, entry.values
        if (surplus := _surplus(entry)) > 0:
            return [entry._trim(surplus, x) for x in both]
        return [x[..., : min(entry.offset, self.max_size), :] for x in both]

    def _new_stock(self) -> Any:
        return RotatingKVCache(self.max_size, self._num_first)

    def _ring_index(self) -> mx.array:
        """The index of each sequence's ring before the pass, ``[num_sequences]``."""
        offsets, indices = zip(*self._joined, strict=True)
        num_new = self._offsets.array - mx.array(offsets, mx.int32)
        return self._advanced(mx.array(indices, mx.int32), num_new)

    def _advanced(self, index: mx.array, num_rows: mx.array) -> mx.array:
        """``advanced`` on the device."""
        index, period = index + num_rows, self.max_size - self._num_first
        again = self._num_first + (index - self.max_size - 1) % period + 1
        return mx.where(index <= self.max_size, index, again)

    def _in_slots(
        self, slots: mx.array, last_row: mx.array, index: mx.array
    ) -> mx.array:
        return rows_in_slots(slots, index, last_row, self.max_size, self._num_first)

    def _views(self, num_rows: int) -> SlotViews:
        """The slots as each row sees them."""
        assert self._rows is not None
        slots = mx.arange(self.max_size)
        last_row = mx.arange(num_rows)[:, None]
        found = self._in_slots(slots, last_row, self._index[:, None, None])
        sources = mx.where(found < 0, slots, self.max_size + found)
        both = zip(self._arrays, self._rows, strict=True)
        held = [mx.concatenate(pair, axis=2)[:, :, None] for pair in both]
        places = sources[:, None, :, :, None]
        return SlotViews(*(mx.take_along_axis(x, places, axis=3) for x in held))

    def _after(self, num_rows: mx.array, one: slice = slice(None)) -> list[mx.array]:
        """What the slots of the pass hold once so many of its rows are kept."""
        assert self._rows is not None
        slots, index = self._slots[one], self._index[one]
        found = self._in_slots(slots, num_rows[:, None] - 1, index[:, None])
        is_kept, rows = (found >= 0)[:, None, :, None], mx.maximum(found, 0)
        both = zip(self._rows, self._saved, strict=True)
        return [mx.where(is_kept, _taken(x[one], rows), y[one]) for x, y in both]


class BatchStates(ArraysCache):
    """States of a recurrent layer: of its convolution, and of the recurrence.

    After a pass in which the layer kept its states after every row, those are ``held``,
    and the ones that count are taken from among them when somebody asks.
    """

    def __init__(self) -> None:
        self.held: RowStates | None = None
        super().__init__(2)

    @property
    def cache(self) -> list[mx.array | None]:
        if self.held is not None:
            self.cache = self.held.taken()
        return self._arrays

    @cache.setter
    def cache(self, arrays: list[mx.array | None]) -> None:
        self._arrays, self.held = arrays, None

    @property
    def nbytes(self) -> int:
        held = self.held
        return super().nbytes if held is None else held.nbytes

    def check(self, entry: Any) -> None:
        is_known = type(entry) is ArraysCache and len(entry.cache) == len(self.cache)
        if not is_known or any(x is None for x in entry.cache):
            _refuse("a recurrent entry is empty or of another type")

    def join(self, entry: ArraysCache) -> None:
        pairs = zip(self.cache, entry.cache, strict=True)
        self.cache = [x if y is None else mx.concatenate([y, x]) for y, x in pairs]

    def filter(self, indices: mx.array) -> None:
        self.cache = [None if x is None else x[indices] for x in self.cache]


def _refuse(reason: str) -> None:
    raise SpeculationError(
        f"Cannot speculate for several sequences in one pass: {reason}."
    )


def _surplus(ring: RotatingKVCache) -> int:
    """Slots that a ring drops before the next row, after a long prefill."""
    return int(ring.keys.shape[2]) - int(ring.max_size)


def _places(slots: mx.array, rows: mx.array) -> mx.array:
    return mx.broadcast_to(slots[:, None, :, None], rows.shape)


def _taken(array: mx.array, slots: mx.array) -> mx.array:
    return mx.take_along_axis(array, slots[:, None, :, None], axis=2)


def _padded(array: mx.array, size: int) -> mx.array:
    missing = max(size - array.shape[2], 0)
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else array


def _with_another(array: mx.array) -> mx.array:
    """The array with room for one more sequence."""
    return mx.concatenate([array, mx.zeros((1, *array.shape[1:]), array.dtype)])
