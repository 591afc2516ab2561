"""Where the end of a text has occurred before, found in constant time a token.

Every run of ``MIN_MATCH`` tokens is entered under its hash with the position after it,
and positions with equal hashes form a chain from the latest to the earliest. A lookup
follows the chain of the run that ends the text for at most ``MAX_CANDIDATES`` steps and
compares at most ``MAX_MATCH`` tokens at each, so it takes constant time whatever the
length of the text. Memory is about 260 bytes a token.

Source: prompt lookup decoding (Saxena 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_MATCH = 3  # tokens, the shortest match that is worth a draft
MAX_MATCH = 32  # tokens, beyond which a longer match is not told apart
MAX_CANDIDATES = 8  # earlier occurrences that are compared


class Match(NamedTuple):
    """An earlier occurrence of the end of a text.

    Args:
        length (int): Tokens that are equal, at most ``MAX_MATCH``.
        position (int): Index of the token that followed the occurrence.
    """

    length: int
    position: int


class NgramIndex:
    """The tokens of one text, with an index of their runs.

    Args:
        tokens (Iterable[int]): The beginning of the text.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens = array("q")
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = array("q")  # By position; -1 ends a chain.
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the text."""
        start = len(self._tokens)
        self._tokens.extend(tokens)
        # The run that ends the text is entered when a token follows it.
        for end in range(max(start, MIN_MATCH), len(self._tokens)):
            run = tuple(self._tokens[end - MIN_MATCH : end])
            self._earlier.extend([-1] * (end - len(self._earlier)))
            self._earlier.append(self._latest.get(run, -1))
            self._latest[run] = end

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether the text of the index is the beginning of ``tokens``."""
        return self._tokens == array("q", tokens[: len(self._tokens)])

    def match(self) -> Match | None:
        """The longest earlier occurrence of the end of the text, the latest of equals.

        None if not even its last ``MIN_MATCH`` tokens have occurred before.
        """
        best = None
        position = self._latest.get(tuple(self._tokens[-MIN_MATCH:]), -1)
        for _ in range(MAX_CANDIDATES):
            if position < 0:
                break
            length = self._common_length(position)
            if best is None or length > best.length:
                best = Match(length, position)
            if length == MAX_MATCH:
                break
            position = self._earlier[position]
        return best

    def copy(self, position: int, num_tokens: int) -> list[int]:
        """The tokens from a position on, going on with the copy where the text ends.

        Args:
            position (int): That of a match.
            num_tokens (int): Tokens to copy.
        """
        period = len(self._tokens) - position
        return [self._tokens[position + i % period] for i in range(num_tokens)]

    def _common_length(self, position: int) -> int:
        """How many tokens before a position equal those at the end of the text."""
        tokens, end = self._tokens, len(self._tokens)
        length = MIN_MATCH
        limit = min(MAX_MATCH, position)
        while (
            length < limit and tokens[position - 1 - length] == tokens[end - 1 - length]
        ):
            length += 1
        return length
