"""Where the end of a text has occurred before, found in constant time a token.

Every run of ``LENGTHS`` tokens is entered in a table of hashes with the position after
it, and positions after equal runs form a chain from the latest to the earliest. A
lookup follows a chain for at most ``MAX_CANDIDATES`` steps and compares at most
``MAX_MATCH`` tokens at each, so it takes constant time whatever the length of the text.
Memory is at most 34 bytes a token.

Invariant: an index holds the runs of its text and no others, also after the text was
cut to its first tokens.

Source: prompt lookup decoding (Saxena 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Long runs are looked up first: chains of short ones, such as two words that often
# stand together, have more occurrences than are compared.
LENGTHS = (6, 2)
MIN_MATCH = min(LENGTHS)  # tokens, the shortest match that is found
MAX_MATCH = 32  # tokens, beyond which a longer match is not told apart
MAX_CANDIDATES = 8  # earlier occurrences that are compared
MIN_SLOTS = 1024  # of a table of hashes; a power of two


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
        self._fill(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, position: int) -> int:
        return self._tokens[position]

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes, but for what its arrays have to spare."""
        tokens = self._tokens.itemsize * len(self._tokens)
        return tokens + sum(chains.nbytes for chains in self._chains)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the text."""
        self._tokens.extend(tokens)
        for chains in self._chains:
            chains.enter(self._tokens)

    def cut(self, num_tokens: int) -> None:
        """Keep only the first tokens of the text."""
        removed = self._tokens[num_tokens:]
        if len(removed) > num_tokens:
            # To enter what stays takes less time than to take out what goes.
            self._fill(self._tokens[:num_tokens])
            return
        for chains in self._chains:
            chains.take_out(self._tokens, num_tokens)
        del self._tokens[num_tokens:]

    def common_length(self, tokens: Sequence[int]) -> int:
        """With how many of its first tokens another text begins."""
        other, step = array("i", tokens), 1024
        end = min(len(other), len(self._tokens))
        for start in range(0, end, step):
            stop = min(start + step, end)
            if other[start:stop] != self._tokens[start:stop]:
                return next(i for i in range(start, stop) if other[i] != self[i])
        return end

    def match(self) -> Match | None:
        """The longest earlier occurrence of the end of the text, the latest of equals.

        None if not even its last ``MIN_MATCH`` tokens have occurred before.
        """
        for chains in self._chains:
            best = None
            for position in chains.candidates(self._tokens):
                length = self._common_end(position)
                if best is None or length > best.length:
                    best = Match(length, position)
                if length == MAX_MATCH:
                    break
            if best is not None:
                return best
        return None

    def copy(self, position: int, num_tokens: int) -> list[int]:
        """The tokens from a position on, going on with the copy where the text ends.

        Args:
            position (int): That of a match.
            num_tokens (int): Tokens to copy.
        """
        period = len(self._tokens) - position
        return [self._tokens[position + i % period] for i in range(num_tokens)]

    def _fill(self, tokens: Iterable[int]) -> None:
        self._tokens = array("i")
        self._chains = [_Chains(length) for length in LENGTHS]
        self.extend(tokens)

    def _common_end(self, position: int) -> int:
        """How many tokens before a position equal those at the end of the text."""
        tokens, end = self._tokens, len(self._tokens)
        length, limit = 0, min(MAX_MATCH, position)
        while (
            length < limit and tokens[position - 1 - length] == tokens[end - 1 - length]
        ):
            length += 1
        return length


class _Chains:
    """The positions after all runs of one length; those of equal runs form a chain.

    ``_latest`` is a table of hashes with open addressing: a slot has the last position
    of one run. ``_earlier`` has for each position the one before it in its chain; -1
    ends a chain. The run that ends the text is entered when a token follows it.
    """

    def __init__(self, length: int):
        self.length = length
        self._latest = array("i", [-1]) * MIN_SLOTS
        self._earlier = array("i")

    @property
    def nbytes(self) -> int:
        num_numbers = len(self._latest) + len(self._earlier)
        return self._latest.itemsize * num_numbers

    def enter(self, tokens: array[int]) -> None:
        """Enter the runs that have been added to a text."""
        if (num_slots := _num_slots(len(tokens))) > len(self._latest):
            self._latest, self._earlier = array("i", [-1]) * num_slots, array("i")
        latest, earlier = self._latest, self._earlier
        for end in range(self.length + len(earlier), len(tokens)):
            slot = self._slot(tokens, end)
            earlier.append(latest[slot])
            latest[slot] = end

    def take_out(self, tokens: array[int], num_tokens: int) -> None:
        """Undo, in reverse, what was entered since a text had so many tokens."""
        while self._earlier and self.length + len(self._earlier) > num_tokens:
            end = self.length + len(self._earlier) - 1
            self._latest[self._slot(tokens, end)] = self._earlier.pop()

    def candidates(self, tokens: array[int]) -> Iterable[int]:
        """Positions after runs that are equal to the end of the text, latest first."""
        if len(tokens) <= self.length:
            return
        position = self._latest[self._slot(tokens, len(tokens))]
        for _ in range(MAX_CANDIDATES):
            if position < 0:
                return
            yield position
            position = self._earlier[position - self.length]

    def _slot(self, tokens: array[int], end: int) -> int:
        """The slot of the run that ends at a position, or a free one for it."""
        length, latest, mask = self.length, self._latest, len(self._latest) - 1
        run = tokens[end - length : end]
        slot = hash(tuple(run)) & mask
        while (other := latest[slot]) >= 0 and tokens[other - length : other] != run:
            slot = (slot + 1) & mask
        return slot


def _num_slots(num_tokens: int) -> int:
    """The size of a table, a power of two, that is filled to three quarters at most."""
    return max(1 << (num_tokens * 4 // 3).bit_length(), MIN_SLOTS)
