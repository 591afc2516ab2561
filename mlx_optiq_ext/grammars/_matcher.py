"""One grammar at work on one reply."""

from __future__ import annotations

from typing import Any

from .._errors import GrammarError
from ._library import library
from ._vocabulary import Vocabulary

# What a grammar may cost: per mask about 15 ms, and all in all about 100 MB. With
# llguidance's own limits it could be 500 MB.
LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}


class Grammar:
    """A grammar that was compiled for a vocabulary.

    Args:
        text (str): As llguidance takes it.
        vocabulary (Vocabulary): The tokens that replies are made of.

    Raises:
        GrammarError: If it is malformed, not supported or too complex.
    """

    def __init__(self, text: str, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        limits = library().LLParserLimits(**LIMITS)
        self._compiled = library().LLMatcher(
            vocabulary.tokenizer, text, log_level=0, limits=limits
        )
        if error := self._compiled.get_error():
            raise GrammarError(_first_line(error))

    def begin(self) -> Matcher:
        """Start on a text."""
        return Matcher(self._compiled.deep_copy(), self.vocabulary)


class Matcher:
    """Reads a text that has to follow a grammar.

    Args:
        matcher (LLMatcher): Of llguidance.
        vocabulary (Vocabulary): The tokens that the text is made of.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary):
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def mask(self) -> bytes:
        """The tokens that may come next, the end among them if the text may end.

        Raises:
            GrammarError: If it is too complex here.
        """
        mask = self._matcher.compute_bitmask()
        if error := self._matcher.get_error():
            raise GrammarError(f"the grammar is too complex: {_first_line(error)}")
        return mask

    def forced(self) -> list[int]:
        if not self.is_complete:
            return self._matcher.compute_ff_tokens()
        ends = self._vocabulary.end_tokens
        return list(ends) if len(ends) == 1 else []

    def advance(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def roll_back(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)


def _first_line(error: str) -> str:
    """What is wrong, without the state of llguidance's parser."""
    return " ".join(error.partition("<state>")[0].split())
