"""The target and its cache entries, as the decode loop sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import CacheList, make_prompt_cache

from ..rollback import (
    Tape,
    Transaction,
    check_entries,
    has_known_recurrence,
    prepare_recurrence,
)


@dataclass(frozen=True)
class CacheOptions:
    """Those of mlx-lm's ``generate_step``."""

    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int


class Output:
    """What a forward pass of the target computes.

    Args:
        first (mx.array): The states if the target shows them, otherwise the logits:
            ``[1, num_tokens, hidden or vocab]``.
        project (Callable, optional): Makes logits of states.
    """

    def __init__(
        self,
        first: mx.array,
        project: Callable[[mx.array], mx.array] | None = None,
    ):
        self.first = first
        self._project = project

    @property
    def states(self) -> mx.array | None:
        """The hidden states, ``[1, num_tokens, hidden]``, None if not shown."""
        return None if self._project is None else self.first

    @cached_property
    def logits(self) -> mx.array:
        """Logits, ``[1, num_tokens, vocab]``, which cost nothing until asked for."""
        return self.first if self._project is None else self._project(self.first)


class Target:
    """A model with the cache of one sequence.

    Args:
        model (nn.Module): The model.
        shows_states (bool): Whether the hidden states of the model are of interest,
          which has ``hidden_states`` and ``project`` then.
        prompt_cache (list[Any], optional): Entries to use, the target's first.
        options (CacheOptions): How to make and quantise entries.

    Raises:
        ValueError: If ``prompt_cache`` has too few entries for the model.
        SpeculationError: If an entry cannot be rolled back.
    """

    def __init__(
        self,
        model: nn.Module,
        shows_states: bool,
        prompt_cache: list[Any] | None,
        options: CacheOptions,
    ):
        made = make_prompt_cache(model, options.max_kv_size)
        self.cache = made if prompt_cache is None else prompt_cache
        self.num_entries = len(made)
        if len(self.cache) < self.num_entries:
            raise ValueError(
                f"prompt_cache has {len(self.cache)} entries, expected "
                f"{self.num_entries} for this model."
            )
        check_entries(self.entries, model)
        self._model = model
        self._shows_states = shows_states
        self._is_taped = has_known_recurrence(model)
        if self._is_taped:
            prepare_recurrence(model)
        self._options = options

    @property
    def entries(self) -> list[Any]:
        return self.cache[: self.num_entries]

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache; 0 where no entry counts them."""
        offsets = [getattr(entry, "offset", 0) for entry in _leaves(self.entries)]
        return max(offsets, default=0)

    def forward(
        self,
        tokens: mx.array,
        embeddings: mx.array | None = None,
        entries: list[Any] | None = None,
    ) -> Output:
        """Process the next tokens, or what replaces them.

        Args:
            tokens (mx.array): ``[num_tokens]``.
            embeddings (mx.array, optional): Read in place of the tokens',
              ``[num_tokens, hidden]``.
            entries (list, optional): Those of a transaction. Default: the cache's own.
        """
        cache = self.entries if entries is None else entries
        options = {} if embeddings is None else {"input_embeddings": embeddings[None]}
        if not self._shows_states:
            return Output(self._model(tokens[None], cache=cache, **options))
        states = self._model.hidden_states(tokens[None], cache=cache, **options)
        return Output(states, self._model.project)

    def transaction(self) -> Transaction:
        return Transaction(self.entries, Tape() if self._is_taped else None)

    def quantize(self) -> None:
        options, entries = self._options, self.entries
        maybe_quantize_kv_cache(
            entries, options.quantized_kv_start, options.kv_group_size, options.kv_bits
        )
        self.cache[: self.num_entries] = entries

    @property
    def max_rows(self) -> float:
        """The most rows that a pass may have and still equal as many passes of one."""
        num_quantizable = sum(hasattr(entry, "to_quantized") for entry in self.entries)
        if self._options.kv_bits is None or num_quantizable == 0:
            return math.inf
        # Plain decoding quantises after the token that reaches the start, so that
        # token is fed alone.
        start = self._options.quantized_kv_start - 1
        return max(start - self.num_tokens, 1)


def _leaves(entries: Iterable[Any]) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, CacheList):
            yield from _leaves(entry.caches)
        else:
            yield entry
