"""What a pass verifies: tokens that the drafter computes, or copies of the context.

Each pass takes the source that is expected to commit more tokens a second. How probable
copies are to be right is measured by the length of the match that they follow, also
where none is drafted; what they cost is the measured time of passes of their width.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.nn as nn

from .._record import record_of
from ..drafters import Drafter
from ._depth import (
    CONFIRMED,
    MAX_AGE,
    MIN_GAIN,
    MIN_TIMES,
    NUM_TIMES,
    Depth,
    RoundTimes,
    quartile,
)

# Tokens to copy in a pass: with the one before them they are 2, 4, 8, 16 or 32 rows,
# at which kernels change. The first stands for a pass without any.
WIDTHS = (0, 1, 3, 7, 15, 31)
# The share of a pass without copies that the first copy is expected to cost at least.
MIN_STEP = 0.05

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
    """The seconds that passes with copies take, by their width.

    The first pass of a width is left out because it may have had to compile kernels. A
    width that is not known is expected to cost as much more as the one before it did.

    Invariant: what is believed of an unused width is tested again after ``MAX_AGE``
    passes, and after more with every test that confirms it.
    """

    def __init__(self) -> None:
        self._times: list[deque[float]] = [deque(maxlen=NUM_TIMES) for _ in WIDTHS]
        self._num_passes = 0
        self._last_pass: list[int | None] = [None] * len(WIDTHS)
        self._patience = [MAX_AGE] * len(WIDTHS)

    def add(self, width: int, seconds: float | None) -> None:
        """Add the time of a pass, None if it did something else as well."""
        self._num_passes += 1
        if width not in WIDTHS:
            return
        index = WIDTHS.index(width)
        last, self._last_pass[index] = self._last_pass[index], self._num_passes
        if last is None or seconds is None:
            return
        if self._num_passes - last > self._patience[index]:
            self._patience[index] *= CONFIRMED
            self._times[index] = deque([seconds] * (MIN_TIMES - 1), NUM_TIMES)
        self._times[index].append(seconds)

    def seconds(self, width: int, bounds: Callable[[int], float]) -> float:
        """Estimate the time of a pass; infinite where nothing comparable is known.

        Args:
            width (int): Tokens to copy.
            bounds (Callable): What at most a pass of a width takes, as far as is known.
        """
        index = next(i for i, each in enumerate(WIDTHS) if each >= width)
        found = self._seconds(index, bounds)
        return min(found, bounds(width))

    def _seconds(self, index: int, bounds: Callable[[int], float]) -> float:
        if len(self._times[index]) >= MIN_TIMES:
            is_due = self._num_passes - (self._last_pass[index] or 0)
            if index == 0 or is_due <= self._patience[index]:
                return quartile(self._times[index])
        if (bound := bounds(WIDTHS[index])) < math.inf or index == 0:
            return bound
        return self._next(index, bounds)

    def _next(self, index: int, bounds: Callable[[int], float]) -> float:
        """What a width is expected to take by those before it."""
        known = [
            quartile(times) if len(times) >= MIN_TIMES else bounds(width)
            for width, times in zip(WIDTHS[:index], self._times, strict=False)
        ]
        least = known[0] * (1 + MIN_STEP)
        step = known[-1] - known[-2] if index > 1 else 0.0
        return max(known[-1] + step, known[-1], least)


class Planner:
    """Decides for every pass how many tokens to verify, and where they come from.

    Args:
        depth (Depth): Decides how many tokens the drafter computes.
        drafter (Drafter): What computes them, if anything.
        times (CopyTimes): What passes with copies took.
    """

    def __init__(self, depth: Depth, drafter: Drafter, times: CopyTimes):
        self._depth = depth
        self._computes_drafts = drafter.computes_drafts
        self._times = times

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
        plan = self._plan_without(wanted, limit, chances)
        if not any(chances):
            return plan
        if any(plan.num_drafted):
            plan = self._mixed(plan, limit, chances)
        speed = self._speed(plan, chances)
        # Where times are not known, as they are not where a fixed number is asked for,
        # nothing is compared by them.
        for width in WIDTHS[1:] if speed else ():
            other = Plan([0] * len(chances), _at_most(limit(width), chances))
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
        """Copies for the sequences where they are better than what is drafted.

        The pass takes no longer for that, so only tokens are compared.
        """
        drafted, copied = list(plan.num_drafted), list(plan.num_copied)
        numbers = _at_most(limit(max(drafted)), chances)
        for index, (number, each) in enumerate(zip(numbers, chances, strict=True)):
            expected = self._depth.num_tokens(drafted[index])
            if number and _num_tokens(each[:number]) > expected * (1 + MIN_GAIN):
                drafted[index], copied[index] = 0, number
        return Plan(drafted, copied)

    def _speed(self, plan: Plan, chances: Sequence[Chances]) -> float:
        """The expected tokens a second; 0 where the time of a pass is not known."""
        num_tokens = 0.0
        for depth, number, each in zip(*plan, chances, strict=True):
            expected = self._depth.num_tokens(depth) if depth else 1.0
            num_tokens += _num_tokens(each[:number]) if number else expected
        if any(plan.num_drafted):
            return num_tokens / self._seconds_drafted(max(plan.num_drafted))
        width = max(plan.num_copied)
        return num_tokens / self._times.seconds(width, self._seconds_drafted)

    def _seconds_drafted(self, depth: int) -> float:
        """What a pass takes whose drafts are computed; copies take at most that."""
        return self._depth.seconds(depth) if self._computes_drafts else math.inf


def _at_most(limits: Sequence[int], chances: Sequence[Chances]) -> list[int]:
    return [min(n, len(each)) for n, each in zip(limits, chances, strict=True)]


def _num_tokens(chances: Chances) -> float:
    """The expected number of tokens that a pass with such copies commits."""
    return 1 + sum(itertools.accumulate(chances, lambda a, b: a * b))


def make_planner(depth: Depth, model: nn.Module, drafter: Drafter) -> Planner:
    """Make the planner of a generation.

    Args:
        depth (Depth): Decides how many tokens the drafter computes.
        model (nn.Module): The target.
        drafter (Drafter): What drafts for the target.
    """
    return Planner(depth, drafter, copy_times(model, drafter))


def copy_times(model: nn.Module, drafter: Drafter, num_sequences: int = 1) -> CopyTimes:
    """What passes with copies of so many sequences took, beside a drafter."""
    size = (num_sequences - 1).bit_length()
    times = record_of(model).round_times
    return times.setdefault(("copies", drafter.name, size), CopyTimes())
