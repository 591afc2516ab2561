"""Finds stop sequences in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopMatcher:
    """Passes text on up to the first occurrence of a stop sequence.

    The sequence that is complete first wins, of several the longest, so that it does
    not matter how the text was cut.

    Args:
        sequences (Iterable[str]): The stop sequences, none of them empty.
    """

    def __init__(self, sequences: Iterable[str]):
        self._sequences = tuple(sequences)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now known not to belong to a stop sequence."""
        self._held += text
        found = [
            (position + len(sequence), position, sequence)
            for sequence in self._sequences
            if (position := self._held.find(sequence)) >= 0
        ]
        if found:
            _, position, self.matched = min(found)
            return self._take(position)
        num_held = num_undecided(self._held, self._sequences)
        return self._take(len(self._held) - num_held)

    def flush(self) -> str:
        """What was held back, once nothing more can follow."""
        return self._take(len(self._held))

    def _take(self, num_characters: int) -> str:
        taken, self._held = self._held[:num_characters], self._held[num_characters:]
        return taken


def num_undecided(text: str, sequences: Sequence[str]) -> int:
    """The length of the longest end of a text that starts one of some sequences."""
    longest = max(map(len, sequences), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(sequence.startswith(text[-length:]) for sequence in sequences):
            return length
    return 0
