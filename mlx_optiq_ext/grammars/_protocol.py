"""What the decode loop asks of whatever says which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .._errors import GrammarError


class Constraint(Protocol):
    """Says which tokens may come next in one reply, and can take tokens back.

    Invariant: all that it answers depends on nothing but the tokens that it was
    advanced over, less those taken back.
    """

    def mask(self) -> bytes | None:
        """The tokens that may come next, a bit for each; None if all may.

        The bit of token ``t`` is bit ``t % 8`` of byte ``t // 8``. Tokens beyond the
        last bit may not come.

        Raises:
            GrammarError: If the grammar is too complex here.
        """
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that have to come next, as far as there is only one way to go."""
        ...

    def advance(self, token: int) -> bool:
        """Go on by a token; False, and where it was, if the token is not allowed."""
        ...

    def roll_back(self, num_tokens: int) -> None:
        """Take back the last tokens that were advanced over."""
        ...

    def is_idle(self, num_tokens: int) -> bool:
        """Whether all tokens may come next, now and after any so many tokens."""
        ...


def not_allowed(token: int) -> GrammarError:
    """The error of a sampler that drew what may not come.

    Args:
        token (int): What it drew.
    """
    return GrammarError(f"token {token} was drawn, which the grammar does not allow")
