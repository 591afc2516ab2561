"""A drafter whose acceptance is dialled: it knows what plain decoding emits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_optiq_ext.drafters import Drafter, DraftSession, Proposal

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

    def logits(self, position: int) -> mx.array:
        """Logits ``[1, vocab]`` that propose a token for a position of the script."""
        token = self._tokens[min(position, len(self._tokens) - 1)]
        return mx.where(mx.arange(self._vocab_size) == token, CERTAIN, 0.0)[None]


class DialledSession:
    """The drafter at work on one sequence."""

    def __init__(self, drafter: DialledDrafter, session: DraftSession | None):
        self._drafter = drafter
        self._session = session
        self._num_seen = 0

    @property
    def num_put_off(self) -> int:
        return 0 if self._session is None else self._session.num_put_off

    @property
    def last_state(self) -> mx.array | None:
        return None if self._session is None else self._session.last_state

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        if self._session is not None:
            self._session.prefill(tokens, states, embeddings)

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        self._num_seen += tokens.size
        if self._session is not None:
            overriding = _Overriding(self._drafter, proposal, self._num_seen)
            self._session.draft(tokens, states, num_draft_tokens, overriding)
            return
        for position in range(self._num_seen, self._num_seen + num_draft_tokens):
            proposal.add(self._drafter.logits(position))

    def catch_up(self) -> None:
        if self._session is not None:
            self._session.catch_up()

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        if self._session is not None:
            self._session.close(num_tokens, last_state)


class _Overriding:
    """A proposal that has a drafter's logits computed and takes others."""

    def __init__(self, drafter: DialledDrafter, proposal: Proposal, num_seen: int):
        self._drafter = drafter
        self._proposal = proposal
        self._num_seen = num_seen
        self.vocab_size = proposal.vocab_size

    @property
    def tokens(self) -> list[mx.array]:
        return self._proposal.tokens

    def add(self, logits: mx.array) -> None:
        position = self._num_seen + len(self.tokens)
        dialled = self._drafter.logits(position).astype(logits.dtype)
        self._proposal.add(mx.depends(dialled, [logits]))
