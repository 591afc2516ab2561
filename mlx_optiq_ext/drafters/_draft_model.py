"""Drafting with an ordinary, smaller language model.

Invariant between generations: the draft model's cache holds the tokens that the
target's holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .._errors import SpeculationError
from ..rollback import (
    Batch,
    Tape,
    Transaction,
    has_known_recurrence,
    prepare_recurrence,
)
from ._batched import SeparateSessions
from ._protocol import DraftSession, Proposal

MAX_PUT_OFF = 64  # tokens that the model is shown together, while nothing is drafted


class DraftModelDrafter:
    """Drafts with a model that has the target's tokenizer.

    Args:
        model (nn.Module): The draft model.
    """

    name = "draft_model"
    reads_hidden_states = False
    computes_drafts = True

    def __init__(self, model: nn.Module):
        self._model = model

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self._model)

    def open_batch(self, batch: Batch) -> SeparateSessions:
        return SeparateSessions()

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> DraftModelSession:
        entries = self.make_cache()
        own = prompt_cache[num_target_entries:]
        if own and len(own) != len(entries):
            raise SpeculationError(
                "Cannot speculate: behind the model's own entries the prompt cache "
                f"has {len(own)}, expected {len(entries)} for this draft model."
            )
        if own:
            entries = own
        prompt_cache[num_target_entries:] = entries
        return DraftModelSession(self._model, entries, num_tokens)


class DraftModelSession(DraftSession):
    """The draft model at work on one sequence.

    ``_put_off`` are tokens that nothing was to be drafted after: the model is shown
    them when it is needed.
    """

    def __init__(self, model: nn.Module, entries: list[Any], num_tokens: int):
        self._model = model
        self._entries = entries
        self._num_tokens = num_tokens
        self._is_taped = has_known_recurrence(model)
        if self._is_taped:
            prepare_recurrence(model)
        self._last_seen = Transaction(entries)
        self._num_last_seen = 0
        self._put_off = mx.zeros(0, mx.uint32)

    @property
    def entries(self) -> list[Any]:
        return self._entries

    @property
    def num_put_off(self) -> int:
        return self._put_off.size

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        if embeddings is not None:
            raise ValueError("A draft model does not support input embeddings.")
        self._num_tokens += tokens.size
        self._forward(tokens)

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        self._num_tokens += tokens.size
        self._put_off = mx.concatenate([self._put_off, tokens])
        if num_draft_tokens == 0:
            if self._put_off.size >= MAX_PUT_OFF:
                self.catch_up()
            return
        logits = self._see(self._put_off)
        self._put_off = self._put_off[:0]
        chain: list[Transaction] = []
        for position in range(num_draft_tokens):
            if position:
                chain.append(Transaction(self._entries))
                logits = self._run(chain[-1], proposal.tokens[-1])
            proposal.add(logits[:, -1])
        for transaction in reversed(chain):
            transaction.keep(0)

    def catch_up(self) -> None:
        if self._put_off.size:
            self._see(self._put_off)
            self._put_off = self._put_off[:0]
            mx.async_eval([entry.state for entry in self._entries])

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        num_extra = max(self._num_tokens - num_tokens, 0)
        # What was put off includes the latest tokens, or is empty.
        if num_put_off := self._put_off.size:
            if num_put_off > num_extra:
                self._forward(self._put_off[: num_put_off - num_extra])
        elif num_extra:
            self._last_seen.keep(self._num_last_seen - num_extra)

    def _see(self, tokens: mx.array) -> mx.array:
        self._num_last_seen = tokens.size
        self._last_seen = Transaction(self._entries, Tape() if self._is_taped else None)
        logits = self._run(self._last_seen, tokens)
        self._last_seen.keep(tokens.size)
        return logits

    def _run(self, transaction: Transaction, tokens: mx.array) -> mx.array:
        return transaction.run(
            lambda entries, num_rows: self._model(tokens[None, :num_rows], entries),
            tokens.size,
        )

    def _forward(self, tokens: mx.array) -> mx.array:
        return self._model(tokens[None], cache=self._entries)
