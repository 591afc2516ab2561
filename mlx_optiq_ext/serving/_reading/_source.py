"""Text that is read while it is still being written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from .._events import Event

Result = TypeVar("Result")

# A reader that may stop anywhere: it yields the events of what it has read, and None
# when it cannot go on without more text.
Steps = Generator[Event | None, None, Result]

Make = Callable[[str], Event | None]


class EndOfText(Exception):
    """The text is over where more of it had to follow."""


class Source:
    """A text and how far it is read.

    The methods that return `Steps` wait until they have seen enough of the text, so
    that what they find does not depend on how it was cut.
    """

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._mark: int | None = None
        self.is_over = False

    @property
    def rest(self) -> str:
        """What is there and not read yet."""
        return self._text[self._position :]

    def feed(self, text: str) -> None:
        marks = [] if self._mark is None else [self._mark]
        start = min(self._position, *marks, len(self._text))
        self._text = self._text[start:] + text
        self._position -= start
        self._mark = None if self._mark is None else self._mark - start

    def close(self) -> None:
        self.is_over = True

    def mark(self) -> None:
        """Remember this place, to which `reset` comes back."""
        self._mark = self._position

    def reset(self) -> None:
        """Go back to the place that is remembered."""
        assert self._mark is not None, "no place is remembered"
        self._position, self._mark = self._mark, None

    def release(self) -> None:
        self._mark = None

    def take(self, num_characters: int) -> str:
        start, self._position = self._position, self._position + num_characters
        return self._text[start : self._position]

    def back(self, num_characters: int) -> None:
        """Leave what was taken last to be taken again."""
        self._position -= num_characters

    def peek(self) -> Steps[str]:
        """The next character, which stays where it is.

        Raises:
            EndOfText: If there is none.
        """
        while not self.rest:
            yield from self._wait()
        return self.rest[0]

    def skip_space(self) -> Steps[None]:
        while True:
            rest = self.rest
            self.take(len(rest) - len(rest.lstrip()))
            if self.rest or self.is_over:
                return
            yield None

    def next_is(self, *choices: str) -> Steps[str]:
        """Take one of some texts if it comes next; "" if none does."""
        while True:
            rest = self.rest
            if found := next(filter(rest.startswith, choices), ""):
                return self.take(len(found))
            if self.is_over or not any(each.startswith(rest) for each in choices):
                return ""
            yield None

    def pass_on(self, make: Make, endings: Sequence[str]) -> Steps[str]:
        """Hand on the text up to the first ending, and take that; "" if none comes.

        The ending that is complete first is the first, of several the longest.

        Args:
            make (Callable): Called with pieces of text; makes an event of one, or none.
            endings (Sequence[str]): What may end it, none of them empty.
        """
        while True:
            if found := first_of(self.rest, endings):
                start, ending = found
                yield from self._hand_on(make, start)
                return self.take(len(ending))
            num_held = 0 if self.is_over else num_undecided(self.rest, endings)
            yield from self._hand_on(make, len(self.rest) - num_held)
            if self.is_over:
                return ""
            yield None

    def through(self, make: Make, endings: Sequence[str]) -> Steps[str]:
        """Do the same as `pass_on`, where one of the endings has to come.

        Raises:
            EndOfText: If none does.
        """
        if ending := (yield from self.pass_on(make, endings)):
            return ending
        raise EndOfText

    def before(self, make: Make, endings: Sequence[str]) -> Steps[None]:
        """Do the same as `through`, but leave the ending where it is."""
        ending = yield from self.through(make, endings)
        self.back(len(ending))

    def _hand_on(self, make: Make, num_characters: int) -> Steps[None]:
        if num_characters and (event := make(self.take(num_characters))):
            yield event

    def _wait(self) -> Steps[None]:
        if self.is_over:
            raise EndOfText
        yield None


def first_of(text: str, sequences: Iterable[str]) -> tuple[int, str] | None:
    """Where the sequence that is complete first starts, and which one it is."""
    found = [
        (position + len(sequence), position, sequence)
        for sequence in sequences
        if (position := text.find(sequence)) >= 0
    ]
    return min(found)[1:] if found else None


def num_undecided(text: str, sequences: Iterable[str]) -> int:
    """The length of the longest end of a text that starts one of some sequences."""
    return max((_num_begun(text, sequence) for sequence in sequences), default=0)


def _num_begun(text: str, sequence: str) -> int:
    start = max(len(text) - len(sequence) + 1, 0)
    while (start := text.find(sequence[0], start)) >= 0:
        if sequence.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
