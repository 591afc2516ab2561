"""Cache entries of several sequences, each at an offset of its own.

Invariant: between passes, ``offsets[i]`` rows of sequence ``i`` count. What is behind
them is never read, and what is before them is what plain decoding would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from .._errors import SpeculationError
from ._apart import LATENT_ATTENTION
from ._recurrence import Tape, has_known_recurrence, prepare_recurrence
from ._sequences import BatchKV, BatchQuantizedKV, BatchRing, BatchStates, Offsets
from ._transaction import check_entries

# Modules of mlx-lm, and classes in them, that need the offset as a number.
_NEED_NUMBERS = {"gpt_bigcode", "llama4", "llama4_text", "deepseek_v41"}
_NEED_NUMBERS_CLASSES = {"DynamicNTKScalingRoPE"}

Forward = Callable[[list[Any], int], Any]


class Batch:
    """Cache entries of several sequences, each at an offset of its own.

    Args:
        model (nn.Module, optional): Whose entries they are; None for those of a head,
            which are keys and values only.
    """

    def __init__(self, model: nn.Module | None = None):
        self.entries: list[Any] = []
        self._model = model
        self._offsets = Offsets()
        self._before: list[int] = []
        self._before_array: Any = None
        # Of every pass whose numbers the host is yet to learn: which one, and its rows.
        self._unlearned: list[tuple[int, int]] = []
        self._num_passes = 0
        self._num_rows = 0
        self._tape: Tape | None = None
        self._is_recurrent = model is not None and has_known_recurrence(model)
        if model is not None and self._is_recurrent:
            prepare_recurrence(model)

    @property
    def num_sequences(self) -> int:
        return len(self._offsets.most)

    @property
    def offsets(self) -> mx.array:
        """Tokens that each sequence holds, ``[num_sequences]``."""
        return self._offsets.array

    def join(self, cache: Sequence[Any]) -> None:
        """Take in stock entries of one sequence, which are copied.

        Args:
            cache (Sequence[Any]): Its prompt cache.

        Raises:
            SpeculationError: If they cannot be taken in. Nothing is changed then.
        """
        check_entries(cache, self._model)
        self._check_model()
        entries = self.entries or [self._made(entry) for entry in cache]
        stock = list(_leaves(cache))
        for mine, entry in zip(_leaves(entries), stock, strict=True):
            mine.check(entry)
        self._end_pass()
        for mine, entry in zip(_leaves(entries), stock, strict=True):
            mine.join(entry)
        self.entries = entries
        num_tokens = max((getattr(entry, "offset", 0) for entry in stock), default=0)
        self._offsets.set([*self._offsets.most, num_tokens])

    def run(self, forward: Forward, num_rows: int) -> Any:
        """Make a pass over all sequences.

        All rows are kept until ``keep`` says otherwise.

        Args:
            forward (Callable): Called with the entries and ``num_rows``; it feeds the
                model tokens ``[num_sequences, num_rows]``.
            num_rows (int): Rows of the pass.

        Returns:
            What ``forward`` returns.
        """
        self._end_pass()
        self._before, self._num_rows = self._offsets.most, num_rows
        self._num_passes += 1
        self._before_array = self._offsets.array
        self._tape = Tape() if self._states else None
        try:
            if self._tape is None:
                return forward(self.entries, num_rows)
            with self._tape.recording():
                return forward(self.entries, num_rows)
        finally:
            self._offsets.set(
                [number + num_rows for number in self._before],
                self._before_array + num_rows,
            )

    def keep(self, num_rows: Sequence[int] | mx.array) -> None:
        """Take back what each sequence has behind its first rows of the last pass.

        Args:
            num_rows (Sequence[int] or mx.array): How many rows each keeps. Give an
                array, of integers, if the host does not know; ``learn`` tells it later.
        """
        is_known = not isinstance(num_rows, mx.array)
        array = mx.array(num_rows, mx.int32) if is_known else num_rows
        is_all = is_known and all(number == self._num_rows for number in num_rows)
        self._offsets.set(self._offsets.most, self._before_array + array)
        if is_known:
            numbers = zip(self._before, num_rows, strict=True)
            self._offsets.set([before + rows for before, rows in numbers])
        else:
            self._unlearned.append((self._num_passes, self._num_rows))
        for entry in self._attended:
            entry.keep(array, is_all)
        if self._states:
            self._keep_states(array, is_all)

    def learn(self, num_rows: Sequence[int]) -> None:
        """Tell the host what an array told ``keep``, of the oldest such call.

        Args:
            num_rows (Sequence[int]): How many rows each sequence kept.
        """
        number, num_all = self._unlearned.pop(0)
        surplus = [num_all - num_kept for num_kept in num_rows]
        most = zip(self._offsets.most, surplus, strict=True)
        self._offsets.set([a - b for a, b in most], self._offsets.array)
        if self._before and number < self._num_passes:
            before = zip(self._before, surplus, strict=True)
            self._before = [a - b for a, b in before]

    def take_back(self, num_rows: int) -> None:
        """Take back the latest rows of every sequence, which are all append-only."""
        most = [number - num_rows for number in self._offsets.most]
        self._offsets.set(most, self._offsets.array - num_rows)

    def extract(self, index: int, num_tokens: int | None = None) -> list[Any]:
        """Stock entries of one sequence that hold its first tokens.

        Args:
            index (int): The sequence.
            num_tokens (int, optional): At least as many as before the last pass.
                Default: all.
        """
        number = self._offsets.most[index] if num_tokens is None else num_tokens
        kept = number - self._before[index] if self._before else None
        states = iter(self._states_of(index, number))
        return [
            self._extracted(entry, index, number, kept, states)
            for entry in self.entries
        ]

    def filter(self, indices: Sequence[int]) -> None:
        """Keep only these sequences, in this order; between ``keep`` and ``run``."""
        self._end_pass()
        if not indices:
            self.entries = []
            self._offsets.set([])
            return
        order = mx.array(list(indices))
        for entry in _leaves(self.entries):
            entry.filter(order)
        most = [self._offsets.most[index] for index in indices]
        self._offsets.set(most, self._offsets.array[order])

    @property
    def _states(self) -> list[BatchStates]:
        return [e for e in _leaves(self.entries) if isinstance(e, BatchStates)]

    @property
    def _attended(self) -> list[BatchKV]:
        return [e for e in _leaves(self.entries) if isinstance(e, BatchKV)]

    def _end_pass(self) -> None:
        """Forget what could be taken back of the last pass."""
        self._before, self._before_array, self._tape = [], None, None
        for entry in self._attended:
            entry.end()

    def _check_model(self) -> None:
        for module in [] if self._model is None else self._model.modules():
            name = type(module).__module__.removeprefix("mlx_lm.models.")
            if name in _NEED_NUMBERS or type(module).__name__ in _NEED_NUMBERS_CLASSES:
                raise SpeculationError(
                    "Cannot speculate for several sequences in one pass: "
                    f"{type(module).__name__} of {name} needs one offset for all."
                )
            if LATENT_ATTENTION in module:
                raise SpeculationError(
                    "Cannot speculate for several sequences in one pass: the latent "
                    f"attention of {name} computes several rows unlike one row."
                )

    def _made(self, entry: Any) -> Any:
        """An empty entry for sequences with entries like this."""
        if type(entry) is CacheList:
            return CacheList(*(self._made(inner) for inner in entry.caches))
        if type(entry) is KVCache:
            return BatchKV(self._offsets)
        if type(entry) is QuantizedKVCache:
            return BatchQuantizedKV(self._offsets, entry.group_size, entry.bits)
        if type(entry) is RotatingKVCache and not entry.empty():
            return BatchRing(self._offsets, entry.max_size, entry.keep)
        if type(entry) is ArraysCache and self._is_recurrent:
            return BatchStates()
        raise SpeculationError(
            "Cannot speculate for several sequences in one pass: a prompt cache "
            f"entry is a {type(entry).__name__}."
        )

    def _extracted(
        self,
        entry: Any,
        index: int,
        num_tokens: int,
        num_kept: int | None,
        states: Iterator[ArraysCache],
    ) -> Any:
        if isinstance(entry, CacheList):
            inner = (
                self._extracted(one, index, num_tokens, num_kept, states)
                for one in entry.caches
            )
            return CacheList(*inner)
        if isinstance(entry, BatchStates):
            return next(states)
        return entry.extract(index, num_tokens, num_kept)

    def _keep_states(self, num_rows: mx.array, is_all: bool) -> None:
        if self._tape is not None and self._tape.rows:
            index = num_rows.astype(mx.int32)
            for entry, rows in zip(self._states, self._recorded().rows, strict=True):
                entry.held = rows.keeping(index)
        elif not is_all:
            states = self._recorded().replayed(num_rows, slice(None))
            for entry, replayed in zip(self._states, states, strict=True):
                entry.cache = replayed

    def _recorded(self) -> Tape:
        """The tape of the last pass."""
        if self._tape is None or not self._tape.has_all(len(self._states)):
            raise SpeculationError("Cannot speculate: mlx-lm is not patched.")
        return self._tape

    def _states_of(self, index: int, num_tokens: int) -> list[ArraysCache]:
        """Stock entries of the recurrent layers of one sequence."""
        if not self._states:
            return []
        one = slice(index, index + 1)
        if num_tokens == self._offsets.most[index]:
            kept = [
                [x[one] for x in entry.cache if x is not None] for entry in self._states
            ]
        else:
            number = mx.array([num_tokens - self._before[index]], mx.int32)
            kept = self._recorded().replayed(number, one)
        entries = [ArraysCache(2) for _ in kept]
        for entry, arrays in zip(entries, kept, strict=True):
            entry.cache = [mx.contiguous(array) for array in arrays]
        return entries


def _leaves(entries: Sequence[Any]) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, CacheList):
            yield from _leaves(entry.caches)
        else:
            yield entry
