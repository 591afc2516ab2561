"""A drafter whose acceptance is dialled: it knows what plain decoding emits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_optiq_ext.drafters import (
    BatchDraftSession,
    Committed,
    Drafter,
    DraftSession,
    Proposal,
    Proposals,
    SeparateSessions,
)

CERTAIN = 30.0  # the logit of the token that is proposed; all others have 0


class DialledDrafter:
    """Proposes the right token with a given probability.

    Args:
        script (list[int]): What plain decoding emits.
        vocab_size (int): Size of the vocabulary.
        acceptance (float): The probability that a draft token is right, which must not
          be mistaken for the acceptance of any trained drafter.
        drafter (Drafter, optional): Runs as it would and has its logits overridden.
          Without one, drafts cost nothing but the logits that say which token it is.
        seed (int): Decides which draft tokens are right.
    """

    def __init__(
        self,
        script: list[int],
        vocab_size: int,
        acceptance: float,
        drafter: Drafter | None = None,
        seed: int = 0,
    ):
        chance = random.Random(seed)
        self._tokens = [
            token if chance.random() < acceptance else (token + 1) % vocab_size
            for token in script
        ]
        self._vocab_size = vocab_size
        self._drafter = drafter
        self.reads_hidden_states = drafter is not None and drafter.reads_hidden_states

    name = "dialled"
    computes_drafts = True

    def make_cache(self) -> list[Any]:
        return [] if self._drafter is None else self._drafter.make_cache()

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> DialledSession:
        if self._drafter is None:
            return DialledSession(self, None)
        session = self._drafter.open(
            prompt_cache, num_target_entries, num_tokens, tokens
        )
        return DialledSession(self, session)

    def open_batch(self) -> BatchDraftSession | None:
        if self._drafter is None:
            return SeparateSessions()
        batch = self._drafter.open_batch()
        return None if batch is None else DialledBatch(self, batch)

    def logits(self, position: int) -> mx.array:
        """Logits ``[1, vocab]`` that propose a token for a position of the script."""
        token = self._tokens[min(position, len(self._tokens) - 1)]
        return mx.where(mx.arange(self._vocab_size) == token, CERTAIN, 0.0)[None]


class DialledSession:
    """The drafter at work on one sequence."""

    def __init__(self, drafter: DialledDrafter, session: DraftSession | None):
        self._drafter = drafter
        self.session = session
        self.num_seen = 0

    @property
    def entries(self) -> list[Any]:
        return [] if self.session is None else list(self.session.entries)

    @property
    def num_put_off(self) -> int:
        return 0 if self.session is None else self.session.num_put_off

    @property
    def last_state(self) -> mx.array | None:
        return None if self.session is None else self.session.last_state

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        if self.session is not None:
            self.session.prefill(tokens, states, embeddings)

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        self.num_seen += tokens.size
        if self.session is not None:
            overriding = _Overriding(self._drafter, proposal, self.num_seen)
            self.session.draft(tokens, states, num_draft_tokens, overriding)
            return
        for position in range(self.num_seen, self.num_seen + num_draft_tokens):
            proposal.add(self._drafter.logits(position))

    def catch_up(self) -> None:
        if self.session is not None:
            self.session.catch_up()

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        if self.session is not None:
            self.session.close(num_tokens, last_state)


class _Overriding:
    """A proposal that has a drafter's logits computed and takes others."""

    def __init__(self, drafter: DialledDrafter, proposal: Proposal, num_seen: int):
        self._drafter = drafter
        self._proposal = proposal
        self.num_seen = num_seen
        self.vocab_size = proposal.vocab_size

    @property
    def tokens(self) -> list[mx.array]:
        return self._proposal.tokens

    def add(self, logits: mx.array) -> None:
        position = self.num_seen + len(self.tokens)
        dialled = self._drafter.logits(position).astype(logits.dtype)
        self._proposal.add(mx.depends(dialled, [logits]))


class DialledBatch:
    """The drafter at work on several sequences, which all emit the same script."""

    def __init__(self, drafter: DialledDrafter, batch: BatchDraftSession):
        self._drafter = drafter
        self._batch = batch
        self.sessions: list[DialledSession] = []

    @property
    def entries(self) -> Sequence[Any]:
        return self._batch.entries

    def is_behind(self, indices: Sequence[int]) -> bool:
        return self._batch.is_behind(indices)

    def join(self, session: Any) -> None:
        self._batch.join(session.session)
        self.sessions.append(session)

    def release(self, index: int) -> DialledSession:
        self._batch.release(index)
        return self.sessions[index]

    def filter(self, indices: Sequence[int]) -> None:
        self._batch.filter(indices)
        self.sessions = [self.sessions[index] for index in indices]

    def draft(
        self, committed: Committed, num_draft_tokens: list[int], proposals: Proposals
    ) -> None:
        for session, number in zip(self.sessions, committed.num_rows, strict=True):
            session.num_seen += number
        numbers = [session.num_seen for session in self.sessions]
        overriding = _OverridingAll(self._drafter, proposals, numbers)
        self._batch.draft(committed, num_draft_tokens, overriding)

    def catch_up(self) -> None:
        self._batch.catch_up()


class _OverridingAll:
    """Proposals that have a drafter's logits computed and take others."""

    def __init__(
        self, drafter: DialledDrafter, proposals: Proposals, num_seen: list[int]
    ):
        self._drafter = drafter
        self._proposals = proposals
        self._positions = num_seen

    @property
    def each(self) -> Sequence[Proposal]:
        return self._proposals.each

    @property
    def latest(self) -> mx.array:
        return self._proposals.latest

    def add(self, logits: mx.array) -> None:
        rows = [self._drafter.logits(position) for position in self._positions]
        dialled = mx.concatenate(rows).astype(logits.dtype)
        self._proposals.add(mx.depends(dialled, [logits]))
        self._positions = [position + 1 for position in self._positions]
