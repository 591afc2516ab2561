"""How many tokens to draft in a round: the depth of speculation.

Rounds of depth d commit E(d) = 1 + a1 + a1 a2 + ... + a1...ad tokens on average, where
ai is the probability that a draft token is accepted if all before it are, and take
C(d) seconds. The automatic depth maximises E(d) / C(d) over d = 0 to 8, all of it
measured while decoding runs. At depth 0 speculation is *parked*: nothing is drafted,
and decoding is as fast as without speculation.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

import mlx.nn as nn

from .._options import MAX_DRAFT_TOKENS, NumDraftTokens
from .._record import record_of
from ..drafters import Drafter

# The times of this many latest rounds of a depth count.
NUM_TIMES = 5
# A depth is known once so many of its rounds have been timed.
MIN_TIMES = 2
# All times of a depth but the last are forgotten after this many rounds without it.
MAX_AGE = 32
# A belief that a test confirms is tested again after this many times more rounds.
CONFIRMED = 4
# A round is a surprise if it takes this many times more or less than was believed.
SURPRISE = 2.0
# A deeper round is preferred only if it gains this share of the speed.
MIN_GAIN = 0.02
# The first position is assumed to have been accepted at this rate in so many rounds.
PRIOR_RATE, PRIOR_WEIGHT = 0.7, 2.0
# The weight of what is known of a position shrinks by this factor with every new round.
MEMORY = 0.97
# Trying other depths may lose this share of the time.
PROBE_SHARE = 0.005
# Two probes are at least this many rounds apart, however little they cost.
PROBE_INTERVAL = 8


class Depth(Protocol):
    """Decides how many tokens to draft."""

    def choose(self) -> int:
        """Return the depth of the next round, which is its number of draft tokens."""
        ...

    def meet(self, times: RoundTimes) -> None:
        """Go on with another number of sequences, whose rounds take other times."""
        ...

    def num_tokens(self, depth: int) -> float:
        """Estimate the number of tokens that a round of a depth commits."""
        ...

    def seconds(self, depth: int) -> float:
        """Estimate the seconds of a round of a depth; infinite if they are unknown."""
        ...

    def observe(
        self, depth: int, accepted: Sequence[int], seconds: float, is_typical: bool
    ) -> None:
        """Learn from a round that is over.

        Args:
            depth (int): The number of tokens that the round drafted for each sequence.
            accepted (Sequence[int]): The number of draft tokens that were accepted, for
              each sequence.
            seconds (float): The seconds that the round took.
            is_typical (bool): Whether the round did nothing but draft and verify, so
              that its time is that of its depth.
        """
        ...


class FixedDepth:
    """The same depth for every round."""

    def __init__(self, depth: int):
        self._depth = depth
        self._rates = AcceptanceRates()

    def choose(self) -> int:
        return self._depth

    def meet(self, times: RoundTimes) -> None:
        pass

    def num_tokens(self, depth: int) -> float:
        return self._rates.num_tokens(depth)

    def seconds(self, depth: int) -> float:
        return math.inf

    def observe(
        self, depth: int, accepted: Sequence[int], seconds: float, is_typical: bool
    ) -> None:
        for num_accepted in accepted:
            self._rates.add(depth, num_accepted)


class RoundTimes:
    """The seconds that rounds take, by depth, which are kept between generations.

    The first round of a depth is left out because it may have had to compile kernels.
    The lower quartile of the others counts because disturbances only make a round
    longer.

    Invariant: the time that is believed of an unused depth is tested again after
    ``MAX_AGE`` rounds, however bad the depth seems. The number of rounds to the next
    test grows with every test that confirms the belief, and falls back after a
    surprise.
    """

    def __init__(self) -> None:
        self._times: list[deque[float]] = [
            deque(maxlen=NUM_TIMES) for _ in range(MAX_DRAFT_TOKENS + 1)
        ]
        self._num_rounds = 0
        self._last_round: list[int | None] = [None] * (MAX_DRAFT_TOKENS + 1)
        self._patience = [MAX_AGE] * (MAX_DRAFT_TOKENS + 1)

    def add(self, depth: int, seconds: float | None) -> None:
        """Add the time of a round.

        Args:
            depth (int): The number of tokens that the round drafted.
            seconds (float, optional): The seconds that the round took. None if it did
              something else as well.
        """
        self._num_rounds += 1
        last, self._last_round[depth] = self._last_round[depth], self._num_rounds
        if last is None or seconds is None:
            return
        times, age = self._times[depth], self._num_rounds - last
        believed = quartile(times) if times else seconds
        if not 1 / SURPRISE < seconds / believed < SURPRISE:
            self._patience[depth] = MAX_AGE
        elif age > MAX_AGE:
            self._patience[depth] *= CONFIRMED
        if age > MAX_AGE and times:
            self._times[depth] = times = deque([times[-1]], NUM_TIMES)
        if seconds < believed / SURPRISE:
            # No disturbance makes a round faster, so the belief was wrong.
            self._times[depth] = times = deque([seconds] * (MIN_TIMES - 1), NUM_TIMES)
        times.append(seconds)

    def is_due(self, depth: int) -> bool:
        """Tell whether the time that is believed of a depth has to be tested."""
        last = self._last_round[depth]
        return last is not None and self._num_rounds - last >= self._patience[depth]

    def seconds(self) -> list[float]:
        """Return the seconds of a round by depth, from 0 to one past the known depths.

        The last of them is extrapolated. The list is empty if depth 0 is not known.
        """
        known = list(itertools.takewhile(lambda x: len(x) >= MIN_TIMES, self._times))
        quartiles = [(quartile(times), len(times)) for times in known]
        smooth = _ascending(_plausible(quartiles))
        if known and len(known) <= MAX_DRAFT_TOKENS:
            mean_step = (smooth[-1] - smooth[0]) / max(len(smooth) - 1, 1)
            smooth.append(smooth[-1] + mean_step)
        return smooth


def quartile(times: Collection[float]) -> float:
    return sorted(times)[len(times) // 4]


def _plausible(values: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Lower every weighted number that is far above a later one to that one."""
    limit, found = math.inf, []
    for value, weight in reversed(values):
        found.append((limit if value > SURPRISE * limit else value, weight))
        limit = min(limit, value)
    return found[::-1]


def _ascending(values: list[tuple[float, int]]) -> list[float]:
    """Fit ascending numbers to weighted ones, because a deeper round takes longer.

    Math: isotonic regression with the algorithm "pool adjacent violators".
    """
    # A block has its mean, its weight, and how many numbers are in it.
    blocks: list[tuple[float, float, int]] = []
    for value, weight in values:
        block = (value, float(weight), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, total, length = blocks.pop()
            sum_ = mean * total + block[0] * block[1]
            total += block[1]
            block = (sum_ / total, total, length + block[2])
        blocks.append(block)
    return [mean for mean, _, length in blocks for _ in range(length)]


class AcceptanceRates:
    """The acceptance rate of each position of a draft; newer rounds count more."""

    def __init__(self) -> None:
        self._tried = [0.0] * MAX_DRAFT_TOKENS
        self._accepted = [0.0] * MAX_DRAFT_TOKENS
        self._prior_weights = [PRIOR_WEIGHT] * MAX_DRAFT_TOKENS

    def add(self, num_drafted: int, num_accepted: int) -> None:
        # The tokens after the first rejected one were neither accepted nor rejected.
        for position in range(min(num_accepted + 1, num_drafted)):
            is_accepted = position < num_accepted
            self._tried[position] = MEMORY * self._tried[position] + 1
            self._accepted[position] = MEMORY * self._accepted[position] + is_accepted
            self._prior_weights[position] *= MEMORY

    def num_tokens(self, depth: int) -> float:
        """Estimate the number of tokens that a round of a depth commits."""
        total = product = 1.0
        # A position of which little is known is assumed to be like the one before it.
        rate = PRIOR_RATE
        known = zip(
            self._tried, self._accepted, self._prior_weights[:depth], strict=False
        )
        for tried, accepted, prior_weight in known:
            rate = (accepted + prior_weight * rate) / (tried + prior_weight)
            product *= rate
            total += product
        return total


class AutoDepth:
    """The depth that commits the most tokens in a second.

    Neighbours of the best depth are tried now and then, as long as that does not lose
    more than a small share of the time.

    Args:
        times (RoundTimes): The times of earlier generations with the same model and
          drafter, to which new ones are added.
    """

    def __init__(self, times: RoundTimes):
        self._times = times
        self._rates = AcceptanceRates()
        self._elapsed = self._lost = 0.0
        self._num_rounds = 0
        self._last_used = [0] * (MAX_DRAFT_TOKENS + 1)
        self._probes: list[int] = []

    def choose(self) -> int:
        speeds = self._speeds()
        if not speeds:
            return 0
        if not self._probes:
            best = _best(speeds)
            self._probes = self._plan_probe(best, speeds) or [best]
        return self._probes.pop()

    def meet(self, times: RoundTimes) -> None:
        """Go on with another number of sequences, whose rounds take other times."""
        if times is not self._times:
            self._times = times
            self._probes = []

    def num_tokens(self, depth: int) -> float:
        return self._rates.num_tokens(depth)

    def seconds(self, depth: int) -> float:
        known = self._times.seconds()
        return known[depth] if depth < len(known) else math.inf

    def observe(
        self, depth: int, accepted: Sequence[int], seconds: float, is_typical: bool
    ) -> None:
        self._num_rounds += 1
        self._last_used[depth] = self._num_rounds
        for num_accepted in accepted:
            self._rates.add(depth, num_accepted)
        self._times.add(depth, seconds if is_typical else None)
        if speeds := self._speeds():
            # A longer round was interrupted, which is not the fault of the depth.
            seconds = min(seconds, (2 + depth) / speeds[0])
            self._elapsed += seconds
            if depth != (best := _best(speeds)) or not is_typical:
                num_tokens = 1 + sum(accepted) / len(accepted)
                loss = seconds - num_tokens / speeds[best]
                self._lost = max(self._lost + loss, 0.0)

    def _speeds(self) -> list[float]:
        """Estimate the tokens per second of each depth."""
        return [
            self._rates.num_tokens(depth) / seconds
            for depth, seconds in enumerate(self._times.seconds())
        ]

    def _plan_probe(self, best: int, speeds: list[float]) -> list[int]:
        """Plan rounds of the neighbour least recently used, if they cost little enough.

        Args:
            best (int): The depth that seems the fastest.
            speeds (list[float]): Tokens per second, by depth.

        Returns:
            list[int]: The depths of the next rounds, empty if none is to be tried.
        """
        neighbours = [d for d in (best - 1, best + 1) if 0 <= d < len(speeds)]
        depth = min(neighbours, key=self._last_used.__getitem__)
        if self._num_rounds - self._last_used[depth] < PROBE_INTERVAL:
            return []
        # A parked round is typical only between two other parked rounds.
        probe = [depth] * (3 if depth == 0 else 1)
        if self._times.is_due(depth):
            return probe
        loss = self._rates.num_tokens(depth) * (1 / speeds[depth] - 1 / speeds[best])
        if self._lost + len(probe) * loss > PROBE_SHARE * self._elapsed:
            return []
        return probe


def _best(speeds: list[float]) -> int:
    """Find the smallest depth that is about as fast as the fastest."""
    enough = max(speeds) / (1 + MIN_GAIN)
    return next(depth for depth, speed in enumerate(speeds) if speed >= enough)


def make_depth(
    num_draft_tokens: NumDraftTokens, model: nn.Module, drafter: Drafter
) -> Depth:
    """Make the depth that a generation asks for.

    The times of rounds are kept with the model, for each kind of drafter apart.

    Args:
        num_draft_tokens (int or str): A number of tokens from 1 to 8, or ``"auto"``.
        model (nn.Module): The target.
        drafter (Drafter): What drafts for the target.
    """
    if num_draft_tokens != "auto":
        return FixedDepth(num_draft_tokens)
    return AutoDepth(round_times(model, drafter))


def round_times(
    model: nn.Module, drafter: Drafter, num_sequences: int = 1
) -> RoundTimes:
    """What rounds of so many sequences, or about as many, took with a drafter."""
    size = (num_sequences - 1).bit_length()
    times = record_of(model).round_times
    return times.setdefault((drafter.name, size), RoundTimes())
