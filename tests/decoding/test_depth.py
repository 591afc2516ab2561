"""The automatic depth finds the fastest depth, and costs little where no depth pays."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Sequence

import mlx.nn as nn
import pytest

from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.decoding._depth import (
    MAX_AGE,
    MIN_GAIN,
    AcceptanceRates,
    AutoDepth,
    FixedDepth,
    RoundTimes,
    _ascending,
    make_depth,
)
from mlx_optiq_ext.drafters import DraftModelDrafter
from tests.helpers import ScriptedDrafter

# What a round of depth 0, 1 and so on costs, its drafts included, in units of one token
# of plain decoding.
COSTS = {
    "each row costs a pass": [1 + 1.07 * depth for depth in range(9)],
    "rows cost half": [1.0, 1.40, 1.77, 2.12, 2.43, 2.8, 3.2, 3.6, 3.9],
    "rows cost little": [1.0, 1.12, 1.33, 1.40, 1.55, 1.7, 1.85, 2.0, 2.1],
    "drafts cost much": [1.0, 1.2, 1.6, 2.0, 2.4, 2.9, 3.4, 3.9, 4.4],
}
RATES = {
    "wrong": [0.0] * 8,
    "poor": [0.35] * 8,
    "usual": [0.7, 0.65, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5],
    "good": [0.85] * 8,
}
SECONDS = 0.014  # of a plain token
BUBBLE = 0.2  # of it, when a round without drafts has to wait for the one before
DRIFT_TOKENS = 30  # after which the speed of a machine that drifts is another
NUM_TOKENS = 256


def run(
    depth: AutoDepth | FixedDepth,
    costs: Sequence[float],
    rates: Sequence[float],
    seed: int = 0,
    noise: float = 0.0,
    drift: float = 0.0,
    num_tokens: int = NUM_TOKENS,
    bursts: Collection[int] = (),
) -> tuple[float, list[int]]:
    """Seconds for some tokens by a depth, and the depths of the rounds.

    A machine whose speed drifts is seen to take longer or less than these seconds, and
    a round in a burst is seen to take a second more.
    """
    chance, total, used, num_emitted = random.Random(seed), 0.0, [], 0
    machine, slowness = random.Random(seed), 0.0
    following: int | None = depth.choose()
    wanted, is_behind = 0, False
    while num_emitted < num_tokens:
        chosen = depth.choose() if following is None else following
        if chosen and is_behind:
            # A drafter first catches up, in a round that drafts nothing.
            wanted, chosen, is_behind = chosen, 0, False
        else:
            wanted, is_behind = 0, chosen == 0
        hits = [chance.random() < rate for rate in rates[:chosen]] + [False]
        num_accepted = hits.index(False)
        seconds = SECONDS * costs[chosen] * (1 + abs(chance.gauss(0, noise)))
        is_early = not used or used[-1] == 0
        if chosen == 0 and not is_early:
            seconds *= 1 + BUBBLE
        # After a round without drafts the next depth is chosen before it is known.
        following = wanted or depth.choose() if chosen == 0 else None
        is_typical = chosen > 0 or (is_early and following == 0 and not wanted)
        kept = math.exp(-costs[chosen] / DRIFT_TOKENS)
        slowness = kept * slowness + math.sqrt(1 - kept**2) * machine.gauss(0, drift)
        seen = seconds * math.exp(slowness) + (len(used) in bursts)
        depth.observe(chosen, [num_accepted], seen, is_typical)
        used.append(chosen)
        total += seconds
        num_emitted += 1 + num_accepted
    return total, used


def seconds_of_fixed(
    depth: int, costs: Sequence[float], rates: Sequence[float]
) -> float:
    times = [run(FixedDepth(depth), costs, rates, seed)[0] for seed in range(20)]
    return statistics.mean(times)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("costs", COSTS)
def test_a_drafter_that_is_always_wrong_costs_less_than_three_percent(
    costs: str, noise: float
) -> None:
    for seed in range(20):
        auto, _ = run(
            AutoDepth(RoundTimes()), COSTS[costs], RATES["wrong"], seed, noise
        )
        plain, _ = run(FixedDepth(0), COSTS[costs], RATES["wrong"], seed, noise)
        assert plain / auto > 0.97


@pytest.mark.parametrize("costs", COSTS)
def test_wrong_drafts_cost_little_on_a_machine_whose_speed_changes(costs: str) -> None:
    ratios = []
    for seed in range(40):
        auto, _ = run(
            AutoDepth(RoundTimes()), COSTS[costs], RATES["wrong"], seed, 0.05, 0.25
        )
        plain, _ = run(FixedDepth(0), COSTS[costs], RATES["wrong"], seed, 0.05)
        ratios.append(plain / auto)
    assert statistics.mean(ratios) > 0.97


@pytest.mark.parametrize("rates", ["poor", "usual", "good"])
@pytest.mark.parametrize("costs", COSTS)
def test_nearly_the_speed_of_the_best_depth_is_reached(costs: str, rates: str) -> None:
    times = [
        run(AutoDepth(RoundTimes()), COSTS[costs], RATES[rates], seed)[0]
        for seed in range(20)
    ]
    best = min(seconds_of_fixed(d, COSTS[costs], RATES[rates]) for d in range(9))
    assert best / statistics.mean(times) > 0.9


BURST_SIZE = 12
MAX_ROUNDS_TO_RECOVER = 64


@pytest.mark.parametrize("start", [20, 100])
@pytest.mark.parametrize("rates", ["usual", "good"])
@pytest.mark.parametrize("costs", ["rows cost half", "rows cost little"])
def test_a_burst_of_slow_rounds_is_forgotten(
    costs: str, rates: str, start: int
) -> None:
    """Also by the next generation, where the first one ends with the burst."""
    end, options = start + BURST_SIZE, (COSTS[costs], RATES[rates])
    speeds = []
    for seed in range(20):
        times = RoundTimes()
        depth = AutoDepth(times)
        _, used = run(depth, *options, seed, num_tokens=1200, bursts=range(start, end))
        speeds.append(speed(used[end + MAX_ROUNDS_TO_RECOVER :], *options))
        times = RoundTimes()
        run(
            AutoDepth(times),
            *options,
            seed,
            num_tokens=start + BURST_SIZE,
            bursts=range(start // 3, 1000),
        )
        _, used = run(AutoDepth(times), *options, seed, num_tokens=600)
        speeds.append(speed(used[MAX_ROUNDS_TO_RECOVER:], *options))
    best = max(speed([depth], *options) for depth in range(9))
    assert statistics.mean(speeds) > 0.9 * best
    assert min(speeds) > 0.8 * best


def speed(
    depths: Sequence[int], costs: Sequence[float], rates: Sequence[float]
) -> float:
    """Tokens that rounds of these depths commit in the time of a plain one."""
    commits = [sum(math.prod(rates[:n]) for n in range(d + 1)) for d in depths]
    return sum(commits) / sum(costs[depth] for depth in depths)


@pytest.mark.parametrize("costs", COSTS)
def test_wrong_drafts_cost_little_after_a_burst_of_slow_rounds(costs: str) -> None:
    for seed in range(20):
        times, options = RoundTimes(), (COSTS[costs], RATES["wrong"], seed)
        run(AutoDepth(times), *options, bursts=range(9, 9 + BURST_SIZE))
        auto, _ = run(AutoDepth(times), *options)
        plain, _ = run(FixedDepth(0), *options)
        assert plain / auto > 0.97


def test_a_round_that_did_something_else_is_billed_to_no_depth() -> None:
    times = RoundTimes()
    for seconds in (9.0, 1.0, 1.0):
        times.add(0, seconds)
        times.add(1, seconds)
    known = times.seconds()
    for _ in range(20):
        times.add(1, None)
    assert times.seconds() == known


def test_what_rounds_take_is_known_to_the_next_generation() -> None:
    times = RoundTimes()
    costs, rates = COSTS["rows cost little"], RATES["good"]
    _, first = run(AutoDepth(times), costs, rates)
    _, second = run(AutoDepth(times), costs, rates)
    assert first[0] == 0
    assert second[0] > 0


def test_drafting_begins_again_when_drafts_become_right() -> None:
    depth = AutoDepth(RoundTimes())
    costs = COSTS["drafts cost much"]
    _, used = run(depth, costs, RATES["wrong"], num_tokens=300)
    assert used[-50:].count(0) > 45
    _, used = run(depth, costs, RATES["good"], num_tokens=400)
    assert used[-50:].count(0) < 5


def test_decoding_is_parked_when_drafts_become_wrong() -> None:
    depth = AutoDepth(RoundTimes())
    costs = COSTS["drafts cost much"]
    _, used = run(depth, costs, RATES["good"], num_tokens=300)
    assert used[-50:].count(0) < 5
    _, used = run(depth, costs, RATES["wrong"], num_tokens=200)
    assert used[-50:].count(0) > 45


def test_a_machine_that_becomes_slower_is_measured_again() -> None:
    depth = AutoDepth(RoundTimes())
    run(depth, COSTS["rows cost little"], RATES["usual"], num_tokens=300)
    _, used = run(depth, COSTS["each row costs a pass"], RATES["usual"], num_tokens=600)
    assert used[-50:].count(0) > 45


def test_one_interruption_does_not_change_the_depth() -> None:
    depth = AutoDepth(RoundTimes())
    costs, rates = COSTS["rows cost little"], RATES["good"]
    run(depth, costs, rates, num_tokens=300)
    depth.observe(3, [3], 60.0, True)
    _, used = run(depth, costs, rates, num_tokens=60)
    assert max(used[:5]) > 1


def test_the_first_round_of_a_depth_is_left_out() -> None:
    times = RoundTimes()
    for seconds in (9.0, 1.0, 1.0):
        times.add(0, seconds)
    assert times.seconds() == [1.0, 1.0]


def test_old_times_are_forgotten() -> None:
    times = RoundTimes()
    for seconds in (9.0, 5.0, 5.0, 5.0, 5.0, 5.0):
        times.add(0, seconds)
    for _ in range(MAX_AGE):
        times.add(1, 6.0)
    times.add(0, 1.0)
    assert times.seconds()[0] == 1.0


def test_numbers_are_made_to_ascend() -> None:
    assert _ascending([(1.0, 1), (3.0, 1), (2.0, 3), (4.0, 1)]) == [
        1.0,
        2.25,
        2.25,
        4.0,
    ]


def test_rates_are_those_of_the_positions_that_were_put_to_the_test() -> None:
    rates = AcceptanceRates()
    for _ in range(500):
        rates.add(num_drafted=3, num_accepted=1)
    assert rates.num_tokens(0) == 1
    assert rates.num_tokens(1) == pytest.approx(2, abs=0.05)
    assert rates.num_tokens(2) == pytest.approx(2, abs=0.15)


def test_what_was_assumed_is_forgotten_with_evidence() -> None:
    """Otherwise wrong drafts look worth their while when their time is misjudged."""
    rates = AcceptanceRates()
    for _ in range(100):
        rates.add(num_drafted=1, num_accepted=0)
    assert rates.num_tokens(1) < 1 + MIN_GAIN / 2


def test_a_model_remembers_its_times_and_stays_what_it_was() -> None:
    model, drafter = nn.Linear(2, 2), ScriptedDrafter([], 2, bool)
    before = set(model)
    assert isinstance(make_depth(3, model, drafter), FixedDepth)
    assert not record_of(model).round_times
    first = make_depth("auto", model, drafter)
    assert isinstance(first, AutoDepth)
    run(first, COSTS["rows cost little"], RATES["good"])
    assert make_depth("auto", model, ScriptedDrafter([], 2, bool)).choose() > 0
    other = DraftModelDrafter(model)
    assert make_depth("auto", model, other).choose() == 0
    assert set(model) == before
