"""The rows of a verify pass: processed as plain decoding would, then judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from .._options import MAX_DRAFT_TOKENS
from ..grammars import masked
from ._acceptance import DraftToken, Greedy, is_pure, normalized, rule_for
from ._lookahead import Lookahead, split_processors


class Row(NamedTuple):
    """The target's word on one position.

    Args:
        token (mx.array): Shape ``[1]``.
        is_accepted (mx.array): Whether that is the draft token, shape ``[1]``.
        logprobs (mx.array): Shape ``[vocab]``, before the sampler's filters.
    """

    token: mx.array
    is_accepted: mx.array
    logprobs: mx.array


class Verifier:
    """Applies the user's logits processors and sampler to drafts and target rows.

    Args:
        sampler (Sampler, optional): As in mlx-lm's ``generate_step``.
        processors (Sequence[LogitsProcessor], optional): Likewise.
        is_timed (bool): Whether the number of drafts depends on the time that they
          take, which must not be seen in the tokens.
        seed (int, optional): As for ``rule_for``.
        has_company (bool): Likewise.
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        processors: Sequence[LogitsProcessor] | None = None,
        is_timed: bool = False,
        seed: int | None = None,
        has_company: bool = False,
    ):
        self.rule = rule_for(sampler, is_timed, seed, has_company)
        self.constrained, self.processors = split_processors(processors or [])
        self.draft_processors = [p for p in self.processors if is_pure(p)]
        self.is_stepwise = self.rule.is_stepwise or (
            self.draft_processors != self.processors
        )

    @property
    def is_plain(self) -> bool:
        """Whether every token is the most probable one of those that may come."""
        return isinstance(self.rule, Greedy) and not self.processors

    @property
    def has_constraint(self) -> bool:
        """Whether not every token may come in the next pass."""
        return self.constrained is not None and not self.constrained.is_idle

    def rows(self, logits: mx.array, proposal: Proposal) -> Iterator[Row]:
        """Judge the rows of ``logits``, shape ``[1, num_rows, vocab]``, in order.

        Tokens that may not come are forbidden in them already.
        """
        for row in range(logits.shape[1]):
            logprobs = logprobs_of(
                logits[:, row, :], proposal.histories[row], self.processors
            )
            draft = proposal.drafts[row] if row < len(proposal.drafts) else None
            token, is_accepted = self.rule.judge(logprobs, draft, proposal.index + row)
            yield Row(token, is_accepted, logprobs.squeeze(0))


class Proposal:
    """The draft tokens of one round, and the tokens before each of its rows.

    Args:
        verifier (Verifier): Whose processors and rule the drafts follow.
        history (mx.array, optional): Tokens up to and including the first one that the
          round feeds to the target, ``[num_tokens]``.
        index (int): Tokens generated before the first one of the round.
        vocab_size (int, optional): That of the target. Models pad theirs to different
            sizes, so a drafter may have another one.
        num_wanted (int): Draft tokens beyond this number do not count.
    """

    def __init__(
        self,
        verifier: Verifier,
        history: mx.array | None,
        index: int = 0,
        vocab_size: int | None = None,
        num_wanted: int = MAX_DRAFT_TOKENS,
    ):
        self._verifier = verifier
        self._num_wanted = num_wanted
        self.vocab_size = vocab_size
        self.index = index
        self.drafts: list[DraftToken] = []
        self.source: str | None = None
        self.histories = [history]

    @property
    def tokens(self) -> list[mx.array]:
        return [draft.token for draft in self.drafts]

    @cached_property
    def lookahead(self) -> Lookahead | None:
        """What may come, None if all tokens may.

        Asked for when the tokens before the round are known, or do not matter.
        """
        constrained = self._verifier.constrained
        if constrained is None or constrained.is_idle:
            return None
        return Lookahead(constrained)

    def add(self, logits: mx.array) -> None:
        history = self.histories[-1]
        logits = _fit(logits, self.vocab_size or logits.shape[-1])
        logits = masked(logits, [self.mask(logits)])
        if self.add_forced():
            return
        logits = processed(logits, history, self._verifier.draft_processors)
        index = self.index + len(self.drafts)
        self._append(self._verifier.rule.propose(logits, index))

    def mask(self, logits: mx.array) -> bytes | None:
        """The tokens that may come after the draft tokens, None if all.

        Args:
            logits (mx.array): What it is for, which are computed meanwhile.
        """
        if len(self.drafts) >= self._num_wanted or self.lookahead is None:
            return None
        if self.lookahead.num_known < len(self.drafts):
            mx.async_eval(logits)
            self.lookahead.see(self.tokens)
        return self.lookahead.masks[-1]

    def masks(self) -> list[bytes | None]:
        """The tokens that may come in each row of the verify pass."""
        if self.lookahead is None:
            return [None] * (len(self.drafts) + 1)
        self.lookahead.see(self.tokens)
        self.lookahead.close()
        return self.lookahead.masks

    def add_forced(self) -> bool:
        """Add the next token if there is only one that may come."""
        number = len(self.drafts)
        if number >= self._num_wanted or self.lookahead is None:
            return False
        if self.lookahead.num_known < number:
            return False
        if (token := self.lookahead.forced) is None:
            return False
        self.append(mx.array([token], mx.uint32))
        self.lookahead.see(self.tokens)
        return True

    def add_certain(self, number: int) -> None:
        """Add tokens that are certain, until there are so many."""
        self._num_wanted = number
        while self.add_forced():
            pass

    def take(self, tokens: Sequence[int]) -> None:
        """Take tokens from elsewhere, as far as they may come."""
        for token in tokens:
            self.append(mx.array([token], mx.uint32))
            if self.lookahead is None:
                continue
            self.lookahead.see(self.tokens)
            if self.lookahead.is_lost:
                self.drop(len(self.drafts) - 1)
                self.lookahead.forget()
                return

    def append(self, token: mx.array) -> None:
        """Take a token, shape ``[1]``, that was drawn already."""
        self._append(DraftToken(token))

    def drop(self, num_kept: int) -> None:
        """Forget all drafts but the first."""
        del self.drafts[num_kept:]
        del self.histories[num_kept + 1 :]

    def _append(self, draft: DraftToken) -> None:
        history = self.histories[-1]
        self.drafts.append(draft)
        if self.lookahead is not None:
            # The host reads it while what is made of it is computed.
            mx.async_eval(draft.token)
        if history is not None:
            history = mx.concatenate([history, draft.token])
        self.histories.append(history)


def num_accepted_of(rows: Sequence[Row]) -> mx.array:
    """How many rows come before the first that is not accepted, shape ``[1]``."""
    is_accepted = mx.concatenate([row.is_accepted for row in rows])
    return mx.cumprod(is_accepted.astype(mx.int32)).sum(keepdims=True)


def _fit(logits: mx.array, vocab_size: int) -> mx.array:
    """Logits ``[1, vocab_size]`` of as many tokens, or more or fewer."""
    if num_missing := max(vocab_size - logits.shape[-1], 0):
        logits = mx.pad(logits, [(0, 0), (0, num_missing)], constant_values=-mx.inf)
    return logits[:, :vocab_size]


def logprobs_of(
    logits: mx.array, history: mx.array | None, processors: Sequence[LogitsProcessor]
) -> mx.array:
    return normalized(processed(logits, history, processors))


def processed(
    logits: mx.array, history: mx.array | None, processors: Sequence[LogitsProcessor]
) -> mx.array:
    if history is not None:
        for processor in processors:
            logits = processor(history, logits)
    return logits
