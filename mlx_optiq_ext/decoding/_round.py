"""One verify pass, from its launch to the tokens that it emits."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx

from ._rows import Proposal, Row, Verifier
from ._target import Output, Target


class Round:
    """A pass of the target over the last emitted token and the draft tokens after it.

    ``run`` and ``dispatch`` only build and start the work, ``collect`` waits for it and
    sets ``emitted``, ``logprobs`` and ``num_accepted``. If a sampler or a logits
    processor of the user's raised, ``error`` has it, and ``emitted`` what came before.

    Args:
        target (Target): The target with its cache.
        verifier (Verifier): How tokens are drawn.
        proposal (Proposal): The draft tokens.
        is_early (bool): Whether the round before is still under way.
        does_more (bool): Whether the drafter catches up in this round.
    """

    def __init__(
        self,
        target: Target,
        verifier: Verifier,
        proposal: Proposal,
        is_early: bool = False,
        does_more: bool = False,
    ):
        self._target = target
        self._verifier = verifier
        self._proposal = proposal
        self._rows: list[Row] = []
        self.is_early = is_early
        self.does_more = does_more
        self.is_collected = False
        self.transaction = target.transaction()
        self.states: mx.array | None = None
        self.emitted: list[int] = []
        self.num_accepted = 0
        self.error: Exception | None = None

    @property
    def num_drafted(self) -> int:
        return len(self._proposal.drafts)

    @property
    def is_certain(self) -> bool:
        """Whether the number of tokens is known before they are: there is one."""
        return self.num_drafted == 0 and self.error is None

    @property
    def tokens(self) -> mx.array:
        """The tokens that are emitted, ``[num_tokens]``, also before they are known."""
        if self.is_certain:
            return self._rows[0].token.astype(mx.uint32)
        return mx.array(self.emitted, mx.uint32)

    @property
    def logprobs(self) -> list[mx.array]:
        return [row.logprobs for row in self._rows]

    def states_of(self, num_rows: int) -> mx.array | None:
        """States of the first rows, ``[1, num_rows, hidden]``, if they are known."""
        return None if self.states is None else self.states[:, :num_rows]

    @property
    def vocab_size(self) -> int | None:
        """The size of the target's vocabulary, None if the round was not read."""
        return self._rows[0].logprobs.shape[-1] if self._rows else None

    def run(self, tokens: mx.array, embeddings: mx.array | None = None) -> None:
        """Feed tokens, shape ``[1 + num_drafted]``, to the target."""
        forward = partial(_forward_rows, self._target, tokens, embeddings)
        self._output: Output = self.transaction.run(forward, 1 + self.num_drafted)
        self.states = self._output.states

    def adopt(
        self, token: mx.array, logprobs: mx.array, states: mx.array | None
    ) -> None:
        """Be a round that is under way: one token, drawn from a row in the cache.

        Args:
            token (mx.array): Shape ``[1]``.
            logprobs (mx.array): Shape ``[vocab]``.
            states (mx.array, optional): Of the row, ``[1, 1, hidden]``, if known.
        """
        self.states = self.transaction.run(lambda *_: states, 1)
        self._rows = [Row(token, mx.array([False]), logprobs)]
        self._packed = token
        self._is_read, self._must_walk = True, False

    def dispatch(self, is_read: bool) -> None:
        """Start the work; if the round is not to be read, without any logits."""
        self._is_read = is_read
        if not is_read:
            mx.async_eval(self._output.first)
            return
        self._logits = self._output.logits
        self._must_walk = self._verifier.is_stepwise and self.num_drafted > 0
        if self._must_walk:
            mx.async_eval(self._logits)
            return
        try:
            self._rows = list(self._verifier.rows(self._logits, self._proposal))
        except Exception as error:
            self.error = error
            return
        packed = [row.token for row in self._rows]
        if self.num_drafted:
            packed.append(_num_accepted(self._rows))
        self._packed = mx.concatenate(packed)
        # What is made of the states brings them along.
        mx.async_eval(self._packed, self.logprobs)

    def collect(self) -> None:
        """Wait for the round."""
        if not self._is_read:
            mx.eval(self._output.first)
        elif self._must_walk:
            self._walk()
        elif self.error is None:
            tokens = self._packed.tolist()
            self.num_accepted = tokens.pop() if self.num_drafted else 0
            self.emitted = tokens[: self.num_accepted + 1]
        self.is_collected = True

    def _walk(self) -> None:
        """Judge row after row, none before its draft token is known to be accepted."""
        try:
            for row in self._verifier.rows(self._logits, self._proposal):
                token, is_accepted = mx.concatenate(
                    [row.token, row.is_accepted]
                ).tolist()
                self._rows.append(row)
                self.emitted.append(token)
                if not is_accepted:
                    break
                self.num_accepted += 1
        except Exception as error:
            self.error = error


def _forward_rows(
    target: Target,
    tokens: mx.array,
    embeddings: mx.array | None,
    entries: list[Any],
    num_rows: int,
) -> Output:
    rows = None if embeddings is None else embeddings[:num_rows]
    return target.forward(tokens[:num_rows], rows, entries)


def _num_accepted(rows: list[Row]) -> mx.array:
    """How many rows come before the first that is not accepted, shape ``[1]``."""
    is_accepted = mx.concatenate([row.is_accepted for row in rows])
    return mx.cumprod(is_accepted.astype(mx.int32)).sum(keepdims=True)
