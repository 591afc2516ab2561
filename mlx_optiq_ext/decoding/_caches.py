"""The prompt caches of several sequences, and the passes of the target over them.

A pass feeds ``[num_sequences, num_rows]`` tokens and every sequence keeps a number of
its own of the rows. Between passes each holds its prompt and what was kept, no more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..rollback import Batch, Transaction
from ._target import CacheOptions, Output, Target


class Caches(Protocol):
    """What the loop asks of the prompt caches of its sequences."""

    @property
    def entries(self) -> list[Any]:
        """All entries, for their size."""
        ...

    def join(self, cache: list[Any]) -> None:
        """Take in another sequence, the last from now on.

        Args:
            cache (list[Any]): The target's entries, and maybe others behind them.

        Raises:
            SpeculationError: If they cannot be taken in.
        """
        ...

    def run(self, tokens: mx.array, num_rows: Sequence[int]) -> Output:
        """Feed tokens, of which each sequence has so many.

        Args:
            tokens (mx.array): Shape ``[num_sequences, max(num_rows)]``.
            num_rows (Sequence[int]): What is behind these rows is padding.
        """
        ...

    def keep(self, num_rows: Sequence[int]) -> None:
        """Take back what each sequence has behind its first rows of the last pass."""
        ...

    def extract(self, index: int, num_tokens: int) -> list[Any]:
        """Stock entries of a sequence that hold its first tokens.

        Nothing but the rows of the last pass can be left out. The sequence is filtered
        out next.
        """
        ...

    def copy(self, index: int, num_tokens: int) -> list[Any]:
        """The same of a sequence that stays."""
        ...

    def filter(self, indices: Sequence[int]) -> None:
        """Keep only these sequences, in this order; between ``keep`` and ``run``."""
        ...

    def max_rows(self, index: int) -> float:
        """The most rows that a pass over a sequence may have."""
        ...


@dataclass
class _Kept:
    """A sequence with a cache of its own, and its latest passes.

    Args:
        target (Target): The target with the cache.
        num_tokens (int): Tokens that the cache held before the latest pass.
        passes (list): The last two, each with the number of tokens before it.
    """

    target: Target
    num_tokens: int
    passes: list[tuple[int, Transaction]] = field(default_factory=list)

    def run(self, tokens: mx.array) -> Output:
        """Feed tokens, ``[num_tokens]``."""
        transaction = self.target.transaction()
        self.passes = [*self.passes[-1:], (self.num_tokens, transaction)]
        return transaction.run(
            lambda entries, number: self.target.forward(tokens[:number], None, entries),
            tokens.size,
        )

    def keep(self, num_rows: int) -> None:
        before, transaction = self.passes[-1]
        transaction.keep(num_rows)
        self.num_tokens = before + num_rows
        self.target.quantize()

    def hold(self, num_tokens: int) -> list[Any]:
        """Go back to some tokens, at most those before the last two passes."""
        for before, transaction in reversed(self.passes):
            transaction.keep(max(num_tokens - before, 0))
            if num_tokens >= before:
                transaction.settle()
                break
        self.target.quantize()
        return self.target.entries


class SeparateCaches:
    """Stock entries: each sequence has a pass of its own.

    This is how a sequence is decoded that is alone, and how several are of which the
    entries, or those that a drafter reads, cannot be put together.

    Args:
        model (nn.Module): The target.
        shows_states (bool): Whether the drafter reads hidden states.
        options (CacheOptions): How to quantise entries.
    """

    def __init__(self, model: nn.Module, shows_states: bool, options: CacheOptions):
        self._model = model
        self._shows_states = shows_states
        self._options = options
        self._kept: list[_Kept] = []

    @property
    def entries(self) -> list[Any]:
        return [entry for kept in self._kept for entry in kept.target.entries]

    def join(self, cache: list[Any]) -> None:
        target = Target(self._model, self._shows_states, cache, self._options)
        self._kept.append(_Kept(target, target.num_tokens))

    def run(self, tokens: mx.array, num_rows: Sequence[int]) -> Output:
        pairs = enumerate(zip(self._kept, num_rows, strict=True))
        outputs = [kept.run(tokens[i, :number]) for i, (kept, number) in pairs]
        if len(outputs) == 1:
            return outputs[0]
        width = max(num_rows)
        first = [
            mx.pad(x.first, [(0, 0), (0, width - x.first.shape[1]), (0, 0)])
            for x in outputs
        ]
        project = self._model.project if self._shows_states else None
        return Output(mx.concatenate(first), project)

    def keep(self, num_rows: Sequence[int]) -> None:
        for kept, number in zip(self._kept, num_rows, strict=True):
            if number:
                kept.keep(number)

    def extract(self, index: int, num_tokens: int) -> list[Any]:
        return self._kept[index].hold(num_tokens)

    def copy(self, index: int, num_tokens: int) -> list[Any]:
        kept = self._kept[index]
        # What belongs together is copied together; the model is not.
        memo = {id(self._model): self._model}
        return copy.deepcopy(kept, memo).hold(num_tokens)

    def filter(self, indices: Sequence[int]) -> None:
        self._kept = [self._kept[index] for index in indices]

    def max_rows(self, index: int) -> float:
        return self._kept[index].target.max_rows


class JointCaches:
    """Entries with an offset for each sequence: one pass for all of them.

    Args:
        model (nn.Module): The target.
        shows_states (bool): Whether the drafter reads hidden states.
    """

    def __init__(self, model: nn.Module, shows_states: bool):
        self._model = model
        self._shows_states = shows_states
        self._num_entries = len(make_prompt_cache(model))
        self._batch = Batch(model)

    @property
    def entries(self) -> list[Any]:
        return self._batch.entries

    def join(self, cache: list[Any]) -> None:
        self._batch.join(cache[: self._num_entries])

    def run(self, tokens: mx.array, num_rows: Sequence[int]) -> Output:
        def forward(entries: list[Any], width: int) -> mx.array:
            call = self._model.hidden_states if self._shows_states else self._model
            return call(tokens[:, :width], cache=entries)

        first = self._batch.run(forward, max(num_rows))
        return Output(first, self._model.project if self._shows_states else None)

    def keep(self, num_rows: Sequence[int]) -> None:
        self._batch.keep(list(num_rows))

    def extract(self, index: int, num_tokens: int) -> list[Any]:
        return self._batch.extract(index, num_tokens)

    def copy(self, index: int, num_tokens: int) -> list[Any]:
        return self._batch.extract(index, num_tokens)

    def filter(self, indices: Sequence[int]) -> None:
        self._batch.filter(indices)

    def max_rows(self, index: int) -> float:
        return math.inf
