"""What may come next in a reply: a thought, the answer, or calls of tools.

A thought is free, up to the number of tokens that it may have; then its end is forced,
by the template's own marker. The answer follows its grammar, if it has one. Calls in an
answer without one follow theirs from the marker with which they start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property

from ._matcher import Grammar, Matcher
from ._vocabulary import Vocabulary, either

Tokens = tuple[int, ...]

MAX_BREAKS = 2  # of the line between a thought and the answer


class Phase(Enum):
    """The part of a reply that the next token belongs to."""

    THOUGHT = auto()
    THOUGHT_START = auto()  # The rest of a marker of several tokens.
    OPENING = auto()  # The first token of an answer, or that of a thought before it.
    ANSWER = auto()
    FREE = auto()  # An answer without a grammar.
    CALL = auto()
    OVER = auto()


@dataclass(frozen=True)
class Rules:
    """All that is asked of a reply.

    Args:
        vocabulary (Vocabulary): The tokens that it is made of.
        answer (Grammar, optional): What the answer has to follow.
        call (Grammar, optional): What a call has to follow, behind its first marker.
        max_thinking_tokens (int, optional): Tokens that a thought may have.
        think_start (tuple[int, ...]): The marker before a thought, empty if the model
            marks none.
        think_end (tuple[int, ...]): The marker behind it.
        separator (tuple[int, ...]): The tokens of one line break and of two, with which
            models set an answer apart from the thought before it.
        call_start (tuple[int, ...]): The marker before a call.
    """

    vocabulary: Vocabulary
    answer: Grammar | None = None
    call: Grammar | None = None
    max_thinking_tokens: int | None = None
    think_start: Tokens = ()
    think_end: Tokens = ()
    separator: Tokens = ()
    call_start: Tokens = ()


@dataclass(frozen=True)
class State:
    """Where in a reply its next token is.

    Args:
        phase (Phase): The part of the reply.
        matcher (Matcher, optional): Of the part, if that has a grammar.
        num_thinking (int): Tokens of the thought so far.
        recent (tuple[int, ...]): The last tokens, as many as a marker may have.
        extra (tuple[int, ...]): What may come in an opening besides the answer.
        num_breaks (int): Line breaks that came since the thought.
    """

    phase: Phase
    matcher: Matcher | None = None
    num_thinking: int = 0
    recent: Tokens = ()
    extra: Tokens = ()
    num_breaks: int = 0


class ReplyConstraint:
    """A constraint on the tokens of one reply.

    Args:
        rules (Rules): What is asked of it.
        in_thought (bool): Whether it begins within a thought.
        may_think (bool): Whether it may begin with one.
    """

    def __init__(
        self, rules: Rules, *, in_thought: bool = False, may_think: bool = False
    ):
        self._rules = rules
        # A state for each token that came, and whether a matcher read the token.
        self._past: list[tuple[State, Matcher | None]] = []
        if in_thought and rules.think_end:
            self._state = State(Phase.THOUGHT)
        else:
            self._state = self._opening(rules.think_start[:1] if may_think else ())

    def mask(self) -> bytes | None:
        state, vocabulary = self._state, self._rules.vocabulary
        if state.phase in (Phase.FREE, Phase.OVER):
            return None
        if forced := self.forced():
            return vocabulary.only(forced[:1])
        if state.phase is Phase.THOUGHT:
            # A reply must not end before the answer that it is to have.
            return vocabulary.without_end if self._rules.answer else None
        assert state.matcher is not None
        mask = state.matcher.mask()
        return either(mask, vocabulary.only(state.extra)) if state.extra else mask

    def forced(self) -> Sequence[int]:
        state, rules = self._state, self._rules
        if state.phase is Phase.THOUGHT:
            return _rest(rules.think_end, state.recent) if self._is_spent else ()
        if state.phase is Phase.THOUGHT_START:
            return _rest(rules.think_start, state.recent)
        if state.matcher is None or state.extra:
            return ()
        return state.matcher.forced()

    def advance(self, token: int) -> bool:
        before, is_read = self._state, self._is_read(token)
        if not self._may_come(token, is_read):
            return False
        self._state = self._after(token, is_read)
        self._past.append((before, before.matcher if is_read else None))
        return True

    def roll_back(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._state, matcher = self._past.pop()
            if matcher is not None:
                matcher.roll_back(1)

    def is_idle(self, num_tokens: int) -> bool:
        rules, phase = self._rules, self._state.phase
        if phase is Phase.OVER:
            return True
        if rules.answer is not None or rules.call is not None:
            return False
        if rules.max_thinking_tokens is None or not rules.think_end:
            return True
        num_thinking = self._state.num_thinking + num_tokens
        return num_thinking < rules.max_thinking_tokens

    @property
    def _is_spent(self) -> bool:
        """Whether the thought has as many tokens as it may have."""
        most = self._rules.max_thinking_tokens
        return most is not None and self._state.num_thinking >= most

    def _is_read(self, token: int) -> bool:
        """Whether a matcher is to read a token, which else is none of the grammar."""
        is_end = token in self._rules.vocabulary.end_tokens
        state = self._state
        return state.matcher is not None and not is_end and token not in state.extra

    def _may_come(self, token: int, is_read: bool) -> bool:
        state, matcher = self._state, self._state.matcher
        if matcher is not None and is_read:
            return matcher.advance(token)
        if token not in self._rules.vocabulary.end_tokens:
            return True
        if state.phase is Phase.THOUGHT and self._rules.answer is not None:
            return False
        return matcher is None or matcher.may_end

    def _opening(self, extra: Tokens = ()) -> State:
        if self._rules.answer is None:
            return State(Phase.FREE)
        return State(Phase.OPENING, self._rules.answer.begin(), extra=extra)

    def _after(self, token: int, is_read: bool) -> State:
        """The state after a token, which its matcher has read if it is to."""
        state, rules = self._state, self._rules
        recent = (*state.recent, token)[-self._longest :]
        is_over = state.phase is Phase.OVER
        if is_over or token in rules.vocabulary.end_tokens:
            return State(Phase.OVER)
        if state.phase is Phase.THOUGHT:
            if _ends_with(recent, rules.think_end):
                return self._opening(rules.separator)
            number = state.num_thinking + 1
            return State(Phase.THOUGHT, None, number, recent)
        if state.phase is Phase.FREE:
            return self._after_free(recent)
        is_marker = token in rules.think_start and not is_read
        if is_marker and state.phase in (Phase.OPENING, Phase.THOUGHT_START):
            is_whole = _ends_with(recent, rules.think_start)
            phase = Phase.THOUGHT if is_whole else Phase.THOUGHT_START
            return State(phase, recent=() if is_whole else recent)
        if state.phase is not Phase.CALL and is_read:
            return State(Phase.ANSWER, state.matcher)
        if state.phase is Phase.OPENING:
            number = state.num_breaks + 1 + rules.separator.index(token)
            extra = rules.separator[: max(MAX_BREAKS - number, 0)]
            return State(Phase.OPENING, state.matcher, extra=extra, num_breaks=number)
        if state.matcher is not None and state.matcher.is_complete:
            return State(Phase.FREE)
        return state

    def _after_free(self, recent: Tokens) -> State:
        """A call or a thought may begin in the middle of an answer."""
        rules = self._rules
        if rules.call is not None and _ends_with(recent, rules.call_start):
            return State(Phase.CALL, rules.call.begin())
        if _ends_with(recent, rules.think_start):
            return State(Phase.THOUGHT)
        return State(Phase.FREE, recent=recent)

    @cached_property
    def _longest(self) -> int:
        """The number of tokens of the longest marker."""
        rules = self._rules
        markers = (rules.think_start, rules.think_end, rules.call_start)
        return max(1, *map(len, markers))


def _ends_with(recent: Tokens, marker: Tokens) -> bool:
    return len(marker) > 0 and recent[-len(marker) :] == marker


def _rest(marker: Tokens, recent: Tokens) -> Tokens:
    """What is left of a marker, whose beginning the last tokens may be."""
    for size in range(min(len(marker) - 1, len(recent)), 0, -1):
        if recent[-size:] == marker[:size]:
            return marker[size:]
    return marker
