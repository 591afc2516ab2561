"""A constraint as one of mlx-lm's logits processors."""

from __future__ import annotations

import mlx.core as mx

from ._masks import masked
from ._protocol import Constraint, not_allowed

TOKEN_SIZE = 4  # bytes of a token in an array


class ConstraintProcessor:
    """Lets plain decoding follow a constraint; our own loop takes ``constraint`` out.

    Whoever decodes may go back to earlier tokens, as mlx-lm's speculation does.

    Args:
        constraint (Constraint): At the beginning of a reply.
    """

    def __init__(self, constraint: Constraint):
        self.constraint = constraint
        self._num_before: int | None = None
        self._seen = b""

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Forbid what may not come next.

        Args:
            tokens (mx.array): All before, ``[num_tokens]``; those of the first call are
                the prompt.
            logits (mx.array): Shape ``[1, vocab]``.
        """
        if self._num_before is None:
            self._num_before = tokens.size
        num_unseen = tokens.size - self._num_before - len(self._seen) // TOKEN_SIZE
        if num_unseen >= 0 and self.constraint.is_idle(num_unseen):
            return logits
        # The forward pass is under way while the host reads and works out the mask.
        tokens = tokens.astype(mx.uint32)
        mx.async_eval(tokens)
        mx.async_eval(logits)
        self._follow(memoryview(tokens)[self._num_before :].tobytes())
        return masked(logits, [self.constraint.mask()])

    def _follow(self, tokens: bytes) -> None:
        """Bring the constraint to where the reply is."""
        seen = self._seen
        num_same = len(seen) if tokens.startswith(seen) else _num_same(tokens, seen)
        self.constraint.roll_back((len(seen) - num_same) // TOKEN_SIZE)
        for token in memoryview(tokens[num_same:]).cast("I"):
            if not self.constraint.advance(token):
                raise not_allowed(token)
        self._seen = tokens


def _num_same(tokens: bytes, others: bytes) -> int:
    """How many bytes of whole tokens two texts begin with."""
    pairs = zip(tokens, others, strict=False)
    differing = (index for index, (one, other) in enumerate(pairs) if one != other)
    num_same = next(differing, min(len(tokens), len(others)))
    return num_same // TOKEN_SIZE * TOKEN_SIZE
