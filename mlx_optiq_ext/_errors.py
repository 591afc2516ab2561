"""The exceptions of this package."""

from __future__ import annotations


class SpeculationError(ValueError):
    """Is raised if speculation is asked for and impossible; the message says why."""


class GrammarError(ValueError):
    """Is raised if a grammar is malformed, not supported, too complex, or not followed.

    Args:
        reason (str): What is wrong.
        path (str): Where, in the words of who gave the grammar: keys and indices of a
            JSON schema, set apart by dots. Empty for all of it.
    """

    def __init__(self, reason: str, path: str = ""):
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.path = path
