"""What a pass verifies: tokens that the drafter computes, or copies of the context.

Each pass takes the source that is expected to commit more tokens a second. How probable
copies are to be right is measured by the length of the match that they follow, also
where none is drafted; what they cost is the measured time of passes of their width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.nn as nn

from .._options import NumDraftTokens
from .._record import record_of
from ..drafters import Drafter
from ._depth import MIN_GAIN, Depth, RoundTimes

# Tokens to copy in a pass: with the one before them they are 2, 4, 8, 16 or 32 rows,
# at which kernels change. The first stands for a pass without any.
WIDTHS = (0, 1, 3, 7, 15, 31)

Limit = Callable[[int], list[int]]
Chances = Sequence[float]


class Plan(NamedTuple):
    """How many tokens each sequence has verified in a pass, by their source.

    Args:
        num_drafted (list[int]): Tokens that the drafter is asked for.
        num_copied (list[int]): Tokens to copy. One of the two numbers is 0.
    """

    num_drafted: list[int]
    num_copied: list[int]


class CopyTimes:
    """The seconds that passes with copies take, by the index of their width."""

    def __init__(self) -> None:
        self._times = RoundTimes()

    def add(self, width: int, seconds: float | None) -> None:
        """Add the time of a pass, None if it did something else as well."""
        if width in WIDTHS:
            self._times.add(WIDTHS.index(width), seconds)

    def seconds(self, width: int) -> float:
        """Estimate the time of a pass; infinite where nothing comparable is known."""
        index = next(i for i, each in enumerate(WIDTHS) if each >= width)
        known = self._times.seconds()
        if self._times.is_due(index) and known:
            # What was believed long ago is put to the test.
            return known[min(index - 1, len(known) - 1)]
        return known[index] if index < len(known) else math.inf


class Planner:
    """Decides for every pass how many tokens to verify, and where they come from.

    Args:
        depth (Depth): Decides how many tokens the drafter computes.
        drafter (Drafter): What computes them, if anything.
        times (CopyTimes): What passes with copies took.
        num_draft_tokens (int or str): How many tokens to copy, or ``"auto"``.
    """

    def __init__(
        self,
        depth: Depth,
        drafter: Drafter,
        times: CopyTimes,
        num_draft_tokens: NumDraftTokens,
    ):
        self._depth = depth
        self._computes_drafts = drafter.computes_drafts
        self._times = times
        self._num_draft_tokens = num_draft_tokens

    def choose(self) -> int:
        """The number of tokens that the drafter should compute."""
        return self._depth.choose() if self._computes_drafts else 0

    def meet(self, depth_times: RoundTimes, times: CopyTimes) -> None:
        """Go on with another number of sequences."""
        self._depth.meet(depth_times)
        self._times = times

    def plan(self, wanted: int, limit: Limit, chances: Sequence[Chances]) -> Plan:
        """Choose the source with the most expected tokens a second.

        Args:
            wanted (int): What ``choose`` returned.
            limit (Callable): Returns for a number of tokens how many of them each
                sequence may have drafted.
            chances (Sequence): For each sequence, how probable each token that can be
                copied is to be right, given those before it.
        """
        nothing, plan = [0] * len(chances), self._plan_without(wanted, limit, chances)
        if not any(chances):
            return plan
        others = [self._mixed(plan, limit, chances)] if any(plan.num_drafted) else []
        others += [
            Plan(nothing, _at_most(limit(width), chances)) for width in self._widths()
        ]
        speed = self._speed(plan, chances)
        for other in others:
            found = self._speed(other, chances)
            if found > speed * (1 + MIN_GAIN):
                plan, speed = other, found
        return plan

    def observe(
        self,
        plan: Plan,
        num_accepted: Sequence[int],
        seconds: float,
        is_typical: bool,
    ) -> None:
        """Learn from a pass that is over.

        Args:
            plan (Plan): What it verified.
            num_accepted (Sequence[int]): How many of the tokens were accepted.
            seconds (float): What it took.
            is_typical (bool): Whether it did nothing else.
        """
        typical = seconds if is_typical else None
        if any(plan.num_copied) and not any(plan.num_drafted):
            self._times.add(max(plan.num_copied), typical)
            return
        depth = max(plan.num_drafted)
        if depth == 0:
            self._times.add(0, typical)
        accepted = [
            accepted
            for accepted, copied in zip(num_accepted, plan.num_copied, strict=True)
            if not copied
        ]
        if self._computes_drafts and accepted:
            self._depth.observe(depth, accepted, seconds, is_typical)

    def _widths(self) -> Sequence[int]:
        if self._num_draft_tokens == "auto":
            return WIDTHS[1:]
        return [self._num_draft_tokens]

    def _plan_without(
        self, wanted: int, limit: Limit, chances: Sequence[Chances]
    ) -> Plan:
        """What is verified where nobody gains by copies."""
        nothing = [0] * len(chances)
        if self._computes_drafts:
            return Plan(limit(wanted), nothing)
        # A sequence that asks for a fixed number of tokens gets them.
        return Plan(nothing, _at_most(limit(0), chances))

    def _mixed(self, plan: Plan, limit: Limit, chances: Sequence[Chances]) -> Plan:
        """Copies for the sequences where they are better than what is drafted."""
        drafted, copied = list(plan.num_drafted), list(plan.num_copied)
        numbers = _at_most(limit(max(drafted)), chances)
        for index, (number, each) in enumerate(zip(numbers, chances, strict=True)):
            expected = self._depth.num_tokens(drafted[index])
            if number and _num_tokens(each[:number]) > expected * (1 + MIN_GAIN):
                drafted[index], copied[index] = 0, number
        return Plan(drafted, copied)

    def _speed(self, plan: Plan, chances: Sequence[Chances]) -> float:
        """The expected tokens of a pass, divided by its seconds where these matter."""
        drafted, copied = plan
        num_tokens = 0.0
        for depth, number, each in zip(drafted, copied, chances, strict=True):
            expected = self._depth.num_tokens(depth) if depth else 1.0
            num_tokens += _num_tokens(each[:number]) if number else expected
        if self._num_draft_tokens != "auto":
            return num_tokens
        if any(drafted) or not any(copied):
            seconds = self._seconds_drafted(max(drafted))
        else:
            seconds = self._times.seconds(max(copied))
        return num_tokens / seconds

    def _seconds_drafted(self, depth: int) -> float:
        if not self._computes_drafts:
            return self._times.seconds(0)
        seconds = self._depth.seconds(depth)
        return math.inf if seconds is None else seconds


def _at_most(limits: Sequence[int], chances: Sequence[Chances]) -> list[int]:
    return [min(n, len(each)) for n, each in zip(limits, chances, strict=True)]


def _num_tokens(chances: Chances) -> float:
    """The expected number of tokens that a pass with such copies commits."""
    return 1 + sum(itertools.accumulate(chances, lambda a, b: a * b))


def make_planner(
    num_draft_tokens: NumDraftTokens, depth: Depth, model: nn.Module, drafter: Drafter
) -> Planner:
    """Make the planner of a generation.

    Args:
        num_draft_tokens (int or str): A number of tokens from 1 to 8, or ``"auto"``.
        depth (Depth): Decides how many tokens the drafter computes.
        model (nn.Module): The target.
        drafter (Drafter): What drafts for the target.
    """
    return Planner(depth, drafter, copy_times(model, drafter), num_draft_tokens)


def copy_times(model: nn.Module, drafter: Drafter, num_sequences: int = 1) -> CopyTimes:
    """What passes with copies of so many sequences took, beside a drafter."""
    size = (num_sequences - 1).bit_length()
    times = record_of(model).round_times
    return times.setdefault(("copies", drafter.name, size), CopyTimes())
