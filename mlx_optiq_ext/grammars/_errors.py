"""What can be wrong with a grammar."""

from __future__ import annotations


class GrammarError(ValueError):
    """A grammar that is malformed, not supported, too complex, or not followed.

    Args:
        reason (str): What is wrong.
        path (str): Where, in the words of who gave the grammar: keys and indices of a
            JSON schema, set apart by dots. Empty for all of it.
    """

    def __init__(self, reason: str, path: str = ""):
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.path = path


def not_allowed(token: int) -> GrammarError:
    """The error of a sampler that drew what may not come.

    Args:
        token (int): What it drew.
    """
    return GrammarError(f"token {token} was drawn, which the grammar does not allow")
