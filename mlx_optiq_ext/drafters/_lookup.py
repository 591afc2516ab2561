"""Drafting without a model: what stands in the context already is copied from there.

Half of what is written about a text stands in that text: edits, quotations, names. If
the last tokens of a sequence have occurred before, what followed them then is a draft.

Invariant: the index of a sequence holds its prompt and the tokens that it emitted, as
far as they are known, and never one that was rejected. It belongs to that sequence
alone: between two turns of a conversation it rests with the cache entries, and whoever
copies these has a copy of it.

Source: prompt lookup decoding (Saxena 2023); n-gram speculation of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ._ngram_index import MAX_MATCH, MIN_MATCH, Match, NgramIndex
from ._protocol import Drafter, DraftSession, Proposal

COPIES = "prompt_lookup"  # where a token came from
# The next token after a match of the shortest length is assumed to have been the copied
# one at this rate in so many cases. With every token that a match is longer, so much of
# the failures are assumed to go.
PRIOR_RATE, PRIOR_WEIGHT, PRIOR_GAIN = 0.35, 2.0, 0.15
# The weight of what is known of a length shrinks by this factor with every new case.
MEMORY = 0.98
# While a match of so many tokens goes on, no other one is looked for.
SURE_MATCH = 16

# This attribute of the first entry of a prompt cache holds the index of its tokens.
_ATTRIBUTE = "_optiq_index"


class MatchRates:
    """How often the token after a match is the copied one, by the match's length."""

    def __init__(self) -> None:
        self._tried = [0.0] * (MAX_MATCH + 1)
        self._right = [0.0] * (MAX_MATCH + 1)

    def add(self, length: int, is_right: bool) -> None:
        """Count a token that followed a match, whether or not it was drafted."""
        length = min(length, MAX_MATCH)
        self._tried[length] = MEMORY * self._tried[length] + 1
        self._right[length] = MEMORY * self._right[length] + is_right

    def chances(self, length: int, num_tokens: int) -> list[float]:
        """How probable each of the next tokens is to be right if all before it are.

        Args:
            length (int): That of the match.
            num_tokens (int): Tokens to copy.
        """
        rates, rate = [PRIOR_RATE] * MIN_MATCH, PRIOR_RATE
        # A length of which little is known is assumed to be like the one before it.
        known = zip(self._tried[MIN_MATCH:], self._right[MIN_MATCH:], strict=True)
        for tried, right in known:
            rate = (right + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            rates.append(rate)
            rate += PRIOR_GAIN * (1 - rate)
        lengths = range(length, length + num_tokens)
        return [rates[min(length, MAX_MATCH)] for length in lengths]


class Lookup:
    """What can be copied next in one sequence, and how probable it is to be right.

    Args:
        index (NgramIndex): Of the tokens so far, as far as they are known.
        num_unknown (int): Tokens of the cache that the index lacks. It is negative if
            the cache counts only those that came since it was handed in.
    """

    def __init__(self, index: NgramIndex, num_unknown: int = 0):
        self._index = index
        self._num_unknown = num_unknown
        self._rates = MatchRates()
        self._match: Match | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, as its cache counts them."""
        return self._num_unknown + len(self._index)

    def read(self, tokens: Sequence[int]) -> None:
        """Take in tokens of the prompt."""
        self._index.extend(tokens)
        self._match = self._index.match()

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in tokens that were emitted, and learn whether copies were right."""
        for token in tokens:
            before, goes_on = self._match, False
            if before is not None:
                goes_on = self._index[before.position] == token
                self._rates.add(before.length, goes_on)
            self._index.extend([token])
            if goes_on and before is not None and before.length >= SURE_MATCH:
                length = min(before.length + 1, MAX_MATCH)
                self._match = Match(length, before.position + 1)
            else:
                self._match = self._index.match()

    def chances(self, num_tokens: int) -> list[float]:
        """How probable each of the tokens that can be copied is to be right.

        Args:
            num_tokens (int): The most that are of interest.

        Returns:
            list[float]: For each token, given that all before it are right. Empty if
            there is no match.
        """
        if self._match is None:
            return []
        return self._rates.chances(self._match.length, num_tokens)

    def copy(self, num_tokens: int) -> list[int]:
        """The tokens that followed the match, none if there is none."""
        if self._match is None:
            return []
        return self._index.copy(self._match.position, num_tokens)

    def rest_with(self, cache: Sequence[Any], num_tokens: int) -> None:
        """Leave the index with the cache entries of the sequence.

        Args:
            cache (Sequence[Any]): Entries that hold the first tokens of the sequence.
            num_tokens (int): How many.
        """
        if cache:
            num_known = max(num_tokens - self._num_unknown, 0)
            self._index.cut(min(num_known, len(self._index)))
            setattr(cache[0], _ATTRIBUTE, (self._num_unknown, self._index))

    @classmethod
    def of(
        cls, cache: Sequence[Any], num_tokens: int, tokens: Sequence[int] = ()
    ) -> Lookup:
        """Go on from what rests with cache entries, or start afresh.

        Args:
            cache (Sequence[Any]): Entries of one sequence, which lose the index.
            num_tokens (int): Tokens that they hold.
            tokens (Sequence[int]): These tokens, as far as they are known.
        """
        num_unknown, index = _taken(cache)
        if tokens:
            # Entries may have been trimmed since, and filled by others.
            index.cut(index.common_length(tokens))
            index.extend(tokens[len(index) :])
            return cls(index, num_tokens - len(tokens))
        if num_tokens == 0 and cache and not cache[0].empty():
            # Recurrent states do not say how many tokens they have seen.
            return cls(index, -len(index))
        num_known = num_tokens - num_unknown
        if not 0 <= num_known <= len(index):
            return cls(NgramIndex(), num_tokens)
        index.cut(num_known)
        return cls(index, num_unknown)


def _taken(cache: Sequence[Any]) -> tuple[int, NgramIndex]:
    first = vars(cache[0]) if cache else {}
    return first.pop(_ATTRIBUTE, (0, NgramIndex()))


class PromptLookupDrafter(Drafter, DraftSession):
    """Drafts nothing itself: all drafts are copies, which every sequence has.

    It is the drafter of models that have no other, and is its own session.
    """

    name = COPIES
    reads_hidden_states = False
    computes_drafts = False

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> DraftSession:
        return self

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        return

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        return
