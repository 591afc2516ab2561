"""What a constraint says of the rows of a pass, whose tokens are not decided yet.

The host works out a mask while the device computes the logits that it is for: those of
a draft step, of which the draft token before is read meanwhile, and in the end those of
the verify pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import LogitsProcessor

from .._options import MAX_DRAFT_TOKENS
from ..grammars import Constraint, ConstraintProcessor, GrammarError, not_allowed
from ._acceptance import unguarded
from ._plan import WIDTHS

# A token that is not known yet, the one after it, and all that may be proposed.
MAX_TOKENS_AHEAD = 2 + max(MAX_DRAFT_TOKENS, WIDTHS[-1])


class Lookahead:
    """A constraint that is advanced over draft tokens, and taken back after all.

    An error of the first row ends the sequence. One behind draft tokens does not, as
    the sequence may never come there: only ``num_usable`` of them can be accepted, and
    the row after these is the last that counts.

    Args:
        constrained (Constrained): At the first row.
    """

    def __init__(self, constrained: Constrained):
        self._constrained = constrained
        self._constraint = constrained.constraint
        self._num_seen = 0
        self.error = constrained.error
        self.is_lost = self.error is not None
        self.num_known = 0
        self.num_usable = MAX_TOKENS_AHEAD
        self.masks: list[bytes | None] = []
        self._add_mask()

    @property
    def forced(self) -> int | None:
        """The next token, if there is only one way to go."""
        if self.is_lost:
            return None
        return next(iter(self._constraint.forced()), None)

    def see(self, tokens: Sequence[mx.array]) -> None:
        """Read those draft tokens that were not read yet, and go on by them."""
        for token in tokens[self.num_known :]:
            self.num_known += 1
            self._advance(int(token.item()))
            self._add_mask()

    def forget(self) -> None:
        """Go on as if the last token, which nothing can follow, had not been seen."""
        self.num_known -= 1
        self.masks.pop()
        if self._num_seen > self.num_known:
            self._constraint.roll_back(1)
            self._num_seen -= 1
        self.num_usable = MAX_TOKENS_AHEAD
        self.is_lost = self.error is not None

    def close(self) -> None:
        """Take the constraint back to the first row.

        Raises:
            Exception: What the mask of the first row or a token before it raised, if
              the sequence has no guard.
        """
        self._constraint.roll_back(self._num_seen)
        self._num_seen, self.is_lost = 0, True
        if self.error is not None:
            self._constrained.fail(self.error)

    def _advance(self, token: int) -> None:
        if self.is_lost:
            return
        try:
            # What is not allowed is rejected, and no row after it counts.
            self.is_lost = not self._constraint.advance(token)
            self._num_seen += not self.is_lost
        except GrammarError as error:
            self._fail(error)

    def _add_mask(self) -> None:
        mask = None
        if not self.is_lost:
            try:
                mask = self._constraint.mask()
            except GrammarError as error:
                self._fail(error)
        self.masks.append(mask)

    def _fail(self, error: GrammarError) -> None:
        """Let the error end its own sequence, if that is where it is."""
        self.is_lost = True
        if self.num_known:
            self.num_usable = self.num_known - 1
        else:
            self.error = error


class Constrained:
    """What may come next in a sequence.

    Args:
        processor (LogitsProcessor): A ``ConstraintProcessor``, in a guard or not.
    """

    def __init__(self, processor: Any):
        inner: Any = unguarded(processor)
        self.constraint: Constraint = inner.constraint
        self.error: GrammarError | None = None
        self._report = getattr(processor, "report", None)

    @property
    def is_idle(self) -> bool:
        """Whether all tokens may come, in the next pass whatever comes before it."""
        return self.error is None and self.constraint.is_idle(MAX_TOKENS_AHEAD)

    def advance(self, token: int) -> None:
        """Go on by a token that is emitted."""
        if self.error is not None:
            return
        try:
            if not self.constraint.advance(token):
                self.error = not_allowed(token)
        except GrammarError as error:
            self.error = error

    def num_forced(self, is_known: bool) -> int:
        """How many tokens are certain.

        Args:
            is_known (bool): Whether the token before them is the last that was emitted.
                Otherwise the first that is certain is on its way already.
        """
        if self.error is not None:
            return 0
        return max(len(self.constraint.forced()) - (not is_known), 0)

    def fail(self, error: Exception) -> None:
        """End the sequence, by a guard's report if it has one.

        Raises:
            Exception: Otherwise.
        """
        if self._report is None:
            raise error
        self._report(error)


def split_processors(
    processors: Iterable[LogitsProcessor],
) -> tuple[Constrained | None, list[LogitsProcessor]]:
    """Take the constraint out of a user's logits processors."""
    constrained, others = None, []
    for processor in processors:
        is_constraint = isinstance(unguarded(processor), ConstraintProcessor)
        if is_constraint and constrained is None:
            constrained = Constrained(processor)
        else:
            others.append(processor)
    return constrained, others
