"""Sequences that come and go, by the interface of mlx-lm's ``GenerationBatch``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import wrapt
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, GenerationBatch

from ..drafters import Drafter
from ._depth import AutoDepth, round_times
from ._loop import Loop, Start, Turn
from ._plan import make_planner
from ._target import CacheOptions

# For what must not wait until the device is through with the next pass.
reading_stream = mx.new_thread_local_stream(mx.cpu)

CACHE_OPTIONS = CacheOptions(None, None, 64, DEFAULT_QUANTIZED_KV_START)


class ReadableRow(wrapt.ObjectProxy):
    """An array that is computed already, of which entries are read at once.

    Whoever reads one with ``row[index].item()`` would otherwise wait for everything
    that was started in the meantime.
    """

    def __getitem__(self, index: Any) -> mx.array:
        with mx.stream(reading_stream):
            return self.__wrapped__[index]


class SpeculativeBatch:
    """Sequences that are decoded together.

    Args:
        model (nn.Module): The target.
        drafter (Drafter): What proposes tokens.
    """

    def __init__(self, model: nn.Module, drafter: Drafter):
        depth = AutoDepth(round_times(model, drafter))
        planner = make_planner(depth, model, drafter)
        self._loop = Loop(model, drafter, planner, CACHE_OPTIONS)
        self._errors: list[Exception] = []

    def __len__(self) -> int:
        return len(self._loop.sequences)

    @property
    def uids(self) -> list[int]:
        return [sequence.uid for sequence in self._loop.sequences]

    @property
    def tokens(self) -> list[list[int]]:
        """Of each sequence, those that its cache holds."""
        return [sequence.tokens for sequence in self._loop.sequences]

    @property
    def prompt_cache(self) -> list[Any]:
        """All entries, for their size."""
        return self._loop.entries

    def extend(self, starts: list[Start]) -> None:
        """Let sequences join at the next step."""
        self._loop.join(starts)

    def filter(self, keep: list[int]) -> None:
        """Keep only these sequences."""
        kept = [self._loop.sequences[index] for index in keep]
        self._loop.remove([x for x in self._loop.sequences if x not in kept])

    def extract_cache(self, idx: int) -> list[Any]:
        """Stock entries of a sequence that hold its ``tokens``, without a drafter's."""
        sequence = self._loop.sequences[idx]
        for start in self._loop.starting:
            if start.sequence is sequence:
                entries = copy.deepcopy(start.cache)
                sequence.copy_index(entries, sequence.num_cached)
                return entries
        return self._loop.copy_cache(sequence)

    def next(self) -> list[GenerationBatch.Response]:
        """The tokens of the next turn.

        Returns:
            list[Response]: As mlx-lm's batch does, but several to a sequence.

        Raises:
            Exception: What a sampler or a logits processor raised in the turn before.
              Its sequence has left the batch, and the others go on.
        """
        if self._errors:
            raise self._errors.pop(0)
        if not self._loop.sequences:
            return []
        return list(self._responses(self._loop.turn()))

    def _responses(self, turn: Turn) -> Iterator[GenerationBatch.Response]:
        for emission in turn.emissions:
            sequence = emission.sequence
            for position, token in enumerate(emission.tokens):
                emission.count(position)
                is_last = position == len(emission.tokens) - 1
                reason = sequence.finish_reason if is_last else None
                prompt_cache = None
                if reason is not None:
                    prompt_cache = self._loop.leave(sequence, sequence.num_cached + 1)
                yield GenerationBatch.Response(
                    uid=sequence.uid,
                    token=token,
                    logprobs=ReadableRow(emission.logprobs[position]),
                    finish_reason=reason,
                    prompt_cache=prompt_cache,
                    all_tokens=None if reason is None else sequence.tokens,
                )
            if emission.error is not None:
                self._errors.append(emission.error)
                self._loop.remove([sequence])
