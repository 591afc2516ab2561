"""A ring of mlx-lm's in which passes of several rows keep the order of its slots.

mlx-lm's ring has the slots in order only as long as it is fed one row at a time; a pass
of several rows leaves it in the order of the tokens, and from then on sums are taken in
another order than in plain decoding.

Invariant: after ``keep(n)`` the ring is what mlx-lm leaves that fed the first ``n``
rows of the pass one at a time, its slots, index and size included.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from ._slots import SlotViews, advanced, rows_in_slots

KeysAndValues = tuple[mx.array, mx.array]


class SlotOrderRing:
    """The cache entry that a model is handed in place of a ring, for one pass.

    A single row is written at once, as mlx-lm does it. Several rows are kept back until
    it is known how many of them stay. Meanwhile each of them reads the slots as they
    would be if the rows before it had been written one at a time.

    Args:
        ring (RotatingKVCache): mlx-lm's ring, which is written to.
        shared (dict): Masks and slot indices that the rings of one pass have in common,
          by their name and what they depend on.
    """

    def __init__(self, ring: RotatingKVCache, shared: dict[Any, mx.array]):
        self._ring = ring
        self._shared = shared
        self._offset, self._index = ring.offset, ring._idx
        self._rows: KeysAndValues | None = None
        self._slots: mx.array | None = None
        self._saved: list[mx.array] = []
        self._seen: Any = None
        self._num_written = 0
        self._is_new = ring.keys is None
        self._replaced: KeysAndValues | None = None

    @property
    def entry(self) -> SlotOrderRing:
        return self

    @property
    def offset(self) -> int:
        num_rows = 0 if self._rows is None else self._rows[0].shape[2]
        return self._offset + num_rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        if self._overwrites(keys.shape[2]):
            keys, values = self._save(keys, values)
        self._rows = keys, values
        if keys.shape[2] == 1:
            self._write(1)
        else:
            self._seen = self._read(keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """Return the keys and values that the rows of the pass attend to."""
        return self._ring.keys_and_values() if self._seen is None else self._seen

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        """Make the mask of a pass; the parameters are those of mlx-lm's ring."""
        if N == 1 or not self._wraps(N):
            return self._ring.make_mask(N, window_size, return_array)
        is_full = self._offset >= self._ring.max_size
        if is_full and (window_size is None or window_size >= self._ring.max_size):
            return None
        key = "mask", N, window_size, self._offset, self._index, self._ring.max_size
        if key not in self._shared:
            rows = [self._row_mask(row, window_size) for row in range(N)]
            self._shared[key] = mx.stack(rows)[None, None]
        return self._shared[key]

    def keep(self, num_rows: int) -> None:
        """Leave the ring with the first ``num_rows`` rows of the pass and no others."""
        self._seen = None
        if self._rows is not None and num_rows != self._num_written:
            if self._num_written:
                self._unwrite()
            self._write(num_rows)
        if num_rows == 0:
            # The pass may be run again, from the offset before it.
            self._rows = None

    def _wraps(self, num_rows: int) -> bool:
        return self._offset + num_rows > self._ring.max_size

    def _row_mask(self, row: int, window_size: int | None) -> mx.array:
        """Make mlx-lm's mask for one row of the pass, over all slots of the ring."""
        ring, max_size = self._ring, self._ring.max_size
        before = RotatingKVCache(max_size, ring.keep)
        before.offset, before._idx = self._offset + row, self._index
        if row:
            index = min(self._index, max_size)
            before._idx = advanced(index, row, max_size, ring.keep)
        mask = before.make_mask(1, window_size)
        num_slots = min(before.offset + 1, max_size)
        if mask is None:
            mask = mx.ones(num_slots, mx.bool_)
        return mx.pad(mask, (0, max_size - num_slots))

    def _read(self, keys: mx.array, values: mx.array) -> Any:
        """Collect what the rows of a pass see of the ring and of each other."""
        ring, num_rows = self._ring, keys.shape[2]
        if ring.keys is None:
            held = keys[..., :0, :], values[..., :0, :]
        elif (num_surplus := ring.keys.shape[2] - ring.max_size) > 0:
            held = tuple(ring._trim(num_surplus, x) for x in (ring.keys, ring.values))
        else:
            num_held = min(self._offset, ring.max_size)
            held = tuple(x[..., :num_held, :] for x in (ring.keys, ring.values))
        both = [
            mx.concatenate(pair, axis=2)
            for pair in zip(held, (keys, values), strict=True)
        ]
        if not self._wraps(num_rows):
            return tuple(both)
        sources = self._sources(held[0].shape[2], num_rows)
        return (SlotViews(*(mx.take(x, sources, axis=2) for x in both)),) * 2

    def _sources(self, num_held: int, num_rows: int) -> mx.array:
        """Find where each row reads each slot, in the ring's rows and then the pass's.

        Returns:
            mx.array: Indices, ``[num_rows, num_slots]``.
        """
        max_size, keep = self._ring.max_size, self._ring.keep
        index = min(self._index, max_size)
        key = "sources", num_held, num_rows, index, max_size, keep
        if key not in self._shared:
            slots, rows = mx.arange(max_size), mx.arange(num_rows)[:, None]
            found = rows_in_slots(slots, mx.array(index), rows, max_size, keep)
            # Slots that are yet to be filled are masked.
            held = mx.where(slots < num_held, slots, 0)
            self._shared[key] = mx.where(found < 0, held, num_held + found)
        return self._shared[key]

    def _overwrites(self, num_rows: int) -> bool:
        """Tell whether rows of the pass take slots whose old rows are still needed."""
        keys, max_size = self._ring.keys, self._ring.max_size
        return keys is not None and keys.shape[2] == max_size and self._wraps(num_rows)

    def _save(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        """Save the slots that the pass may overwrite, before its rows are used.

        The rows that are returned depend on the saved slots, so that evaluating the
        pass saves them. If they were read later, when a row is written to the ring,
        MLX would have to copy the whole ring.
        """
        ring, num_rows = self._ring, keys.shape[2]
        indices = (
            advanced(self._index, row, ring.max_size, ring.keep)
            for row in range(1, num_rows + 1)
        )
        self._slots = mx.array(sorted({index - 1 for index in indices}))
        self._saved = [
            mx.take(x, self._slots, axis=2) for x in (ring.keys, ring.values)
        ]
        return tuple(mx.depends([keys, values], self._saved))

    def _write(self, num_rows: int) -> None:
        """Write the first rows of the pass, so that it can be undone."""
        assert self._rows is not None
        ring = self._ring
        if self._changes_size(num_rows) and ring.keys is not None:
            # These are new handles, because an update in place changes the old ones.
            self._replaced = ring.keys[...], ring.values[...]
        keys, values = (x[..., :num_rows, :] for x in self._rows)
        while keys.shape[2]:
            run = self._num_in_a_run()
            ring._update_in_place(keys[..., :run, :], values[..., :run, :])
            keys, values = keys[..., run:, :], values[..., run:, :]
        self._num_written = num_rows

    def _unwrite(self) -> None:
        """Take back all rows that were written since the pass began."""
        ring = self._ring
        if self._replaced is not None:
            ring.keys, ring.values = self._replaced
        elif self._slots is not None:
            ring.keys[..., self._slots, :], ring.values[..., self._slots, :] = (
                self._saved
            )
        elif self._is_new:
            ring.keys = ring.values = None
        # In all other cases the rows lie past the offset, where nothing is read.
        ring.offset, ring._idx = self._offset, self._index
        self._num_written = 0

    def _changes_size(self, num_rows: int) -> bool:
        """Tell whether writing replaces the ring's arrays by longer or shorter ones."""
        num_slots = 0 if self._ring.keys is None else self._ring.keys.shape[2]
        if num_slots < self._ring.max_size:
            return self._offset + num_rows > num_slots
        return num_slots > self._ring.max_size

    def _num_in_a_run(self) -> int:
        """Count the rows that mlx-lm's ring takes before it grows or wraps around."""
        ring = self._ring
        num_slots = 0 if ring.keys is None else ring.keys.shape[2]
        index = ring._idx
        if ring.offset >= num_slots and num_slots < ring.max_size:
            return min(ring.step, ring.max_size - ring.offset)
        if num_slots >= ring.max_size and index >= ring.max_size:
            num_slots, index = ring.max_size, ring.keep
        return num_slots - index
