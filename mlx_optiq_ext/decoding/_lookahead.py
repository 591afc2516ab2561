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
from ..grammars import Constraint, ConstraintProcessor, not_allowed
from ._acceptance import unguarded
from ._plan import WIDTHS

# A token that is not known yet, the one after it, and all that may be proposed.
MAX_TOKENS_AHEAD = 2 + max(MAX_DRAFT_TOKENS, WIDTHS[-1])


class Lookahead:
    """A constraint that is advanced over draft tokens, and taken back after all.

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
            if not self.is_lost:
                # What is not allowed is rejected, and no row after it counts.
                self.is_lost = not self._constraint.advance(int(token.item()))
                self._num_seen += not self.is_lost
            self._add_mask()

    def forget(self) -> None:
        """Go on as if the last token, which was not allowed, had not been seen."""
        self.num_known -= 1
        self.masks.pop()
        self.is_lost = self.error is not None

    def close(self) -> None:
        """Take the constraint back to the first row.

        Raises:
            Exception: What a mask or the row before the first raised, if the sequence
              has no guard.
        """
        self._constraint.roll_back(self._num_seen)
        self._num_seen, self.is_lost = 0, True
        if self.error is not None:
            self._constrained.fail(self.error)

    def _add_mask(self) -> None:
        mask = None
        if not self.is_lost:
            try:
                mask = self._constraint.mask()
            except Exception as error:
                # It ends its own sequence, once the rows of all are judged.
                self.error, self.is_lost = error, True
        self.masks.append(mask)


class Constrained:
    """What may come next in a sequence.

    Args:
        processor (LogitsProcessor): A ``ConstraintProcessor``, in a guard or not.
    """

    def __init__(self, processor: Any):
        inner: Any = unguarded(processor)
        self.constraint: Constraint = inner.constraint
        self.error: Exception | None = None
        self._report = getattr(processor, "report", None)

    @property
    def is_idle(self) -> bool:
        """Whether all tokens may come, in the next pass whatever comes before it."""
        return self.error is None and self.constraint.is_idle(MAX_TOKENS_AHEAD)

    def advance(self, token: int) -> None:
        """Go on by a token that is emitted."""
        if self.error is None and not self.constraint.advance(token):
            self.error = not_allowed(token)

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
