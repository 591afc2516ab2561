"""The rows of a verify pass: processed as plain decoding would, then judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from ._acceptance import DraftToken, Greedy, is_pure, normalized, rule_for


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
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        processors: Sequence[LogitsProcessor] | None = None,
        is_timed: bool = False,
        seed: int | None = None,
    ):
        self.rule = rule_for(sampler, is_timed, seed)
        self.processors = list(processors or [])
        self.draft_processors = [p for p in self.processors if is_pure(p)]
        self.is_stepwise = self.rule.is_stepwise or (
            self.draft_processors != self.processors
        )

    @property
    def is_plain(self) -> bool:
        """Whether every token is the most probable one of the logits as they are."""
        return isinstance(self.rule, Greedy) and not self.processors

    def rows(self, logits: mx.array, proposal: Proposal) -> Iterator[Row]:
        """Judge the rows of ``logits``, shape ``[1, num_rows, vocab]``, in order."""
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
    """

    def __init__(
        self,
        verifier: Verifier,
        history: mx.array | None,
        index: int = 0,
        vocab_size: int | None = None,
    ):
        self._verifier = verifier
        self.vocab_size = vocab_size
        self.index = index
        self.drafts: list[DraftToken] = []
        self.source: str | None = None
        self.histories = [history]

    @property
    def tokens(self) -> list[mx.array]:
        return [draft.token for draft in self.drafts]

    def add(self, logits: mx.array) -> None:
        history = self.histories[-1]
        logits = _fit(logits, self.vocab_size or logits.shape[-1])
        logits = processed(logits, history, self._verifier.draft_processors)
        index = self.index + len(self.drafts)
        self._append(self._verifier.rule.propose(logits, index))

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
