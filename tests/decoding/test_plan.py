"""Each pass takes the source that commits more tokens a second."""

from __future__ import annotations

import random

import pytest

from mlx_optiq_ext.decoding._depth import AutoDepth, FixedDepth, RoundTimes
from mlx_optiq_ext.decoding._plan import WIDTHS, CopyTimes, Plan, Planner
from mlx_optiq_ext.drafters import PromptLookupDrafter
from tests.helpers import ScriptedDrafter

HEAD = ScriptedDrafter([], 9, lambda position: True)
COPIES = PromptLookupDrafter()
SURE, POOR = [0.97] * 31, [0.1] * 31


def any_number(wanted: int) -> list[int]:
    return [wanted]


def cheap(rows: int) -> float:
    """Seconds of a pass in which rows cost little, as they do on GPUs."""
    return 1 + 0.05 * (rows - 1)


def dear(rows: int) -> float:
    """Seconds of a pass in which every row costs a pass, as on a slow CPU."""
    return float(rows)


class Machine:
    """Passes that take what they are said to take.

    Args:
        cost (Callable): Seconds by the number of rows.
        head (tuple): The rate at which drafts of a head are accepted, and the seconds
            that each takes; None without a head.
    """

    def __init__(self, cost, head=None):
        self.cost, self.head = cost, head
        self.draw = random.Random(1)
        self.times = CopyTimes()
        depth = AutoDepth(RoundTimes()) if head else FixedDepth(0)
        self.planner = Planner(depth, HEAD if head else COPIES, self.times)
        self.seconds = self.num_tokens = 0.0

    def run(self, chances, num_passes, truth=None):
        """Run passes in which there is always a match; the last plan."""
        for _ in range(num_passes):
            wanted = self.planner.choose()
            plan = self.planner.plan(wanted, any_number, [chances])
            number = max(*plan.num_drafted, *plan.num_copied)
            seconds = self.cost(1 + number)
            rate = 0.0
            if plan.num_drafted[0]:
                rate = self.head[0]
                seconds += self.head[1] * number
            elif number:
                rate = (truth or chances)[0]
            accepted = 0
            while accepted < number and self.draw.random() < rate:
                accepted += 1
            self.planner.observe(plan, [accepted], seconds, True)
            self.seconds += seconds
            self.num_tokens += 1 + accepted
        return plan

    @property
    def speed(self):
        return self.num_tokens / self.seconds


def test_sure_copies_are_as_long_as_pays() -> None:
    assert Machine(cheap).run(SURE, 60) == Plan([0], [31])
    assert max(Machine(dear).run(SURE, 60).num_copied) <= 1
    # From the eighth row on, a row costs as much as a pass.
    steps = Machine(lambda rows: 1 + 0.05 * min(rows, 8) + max(rows - 8, 0))
    assert steps.run(SURE, 60) == Plan([0], [7])


@pytest.mark.parametrize("cost", [cheap, dear])
def test_nothing_is_verified_where_there_is_no_match(cost) -> None:
    assert Machine(cost).run([], 30) == Plan([0], [0])


def test_poor_matches_are_left_where_rows_are_dear() -> None:
    machine = Machine(dear)
    machine.run(POOR, 200)
    assert machine.speed > 0.97


@pytest.mark.parametrize("cost", [cheap, lambda rows: 1 + 0.2 * (rows - 1), dear])
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85, 0.97])
def test_nearly_the_speed_of_the_best_width_is_reached(cost, rate) -> None:
    machine = Machine(cost)
    machine.run([rate] * 31, 400)
    speeds = [
        sum(rate**i for i in range(width + 1)) / cost(1 + width) for width in WIDTHS
    ]
    assert machine.speed > 0.9 * max(speeds)


def test_a_better_head_is_not_crowded_out() -> None:
    machine = Machine(cheap, head=(0.9, 0.05))
    assert machine.run([], 200).num_drafted[0] > 0
    assert machine.run(POOR, 50).num_copied == [0]


def test_copies_take_over_where_they_are_better_than_the_head() -> None:
    machine = Machine(cheap, head=(0.6, 0.3))
    machine.run([], 200)
    assert machine.run(SURE, 60).num_copied == [31]
    head_alone = Machine(cheap, head=(0.6, 0.3))
    head_alone.run([], 260)
    assert machine.speed > head_alone.speed


def test_a_head_is_as_fast_as_alone_beside_poor_copies() -> None:
    together, alone = (Machine(cheap, head=(0.7, 0.1)) for _ in range(2))
    together.run(POOR, 600)
    alone.run([], 600)
    assert together.speed > 0.97 * alone.speed


def test_a_fixed_number_takes_what_is_likelier_to_be_right() -> None:
    planner = Planner(FixedDepth(4), HEAD, CopyTimes())
    for _ in range(50):
        planner.observe(Plan([4], [0]), [2], 1.0, True)
    assert planner.plan(4, any_number, [SURE]) == Plan([0], [4])
    assert planner.plan(4, any_number, [POOR]) == Plan([4], [0])
    assert planner.plan(4, any_number, [[]]) == Plan([4], [0])


def test_each_sequence_of_a_pass_has_its_own_source() -> None:
    planner = Planner(FixedDepth(4), HEAD, CopyTimes())
    chances = [SURE, [], POOR, SURE]
    plan = planner.plan(4, lambda wanted: [wanted, wanted, wanted, 0], chances)
    assert plan == Plan([0, 4, 4, 0], [4, 0, 0, 0])


def test_a_wrong_belief_about_a_width_is_unlearned() -> None:
    machine = Machine(cheap)
    machine.run(SURE, 60)
    slow = Machine(dear)
    slow.planner, slow.times = machine.planner, machine.times
    slow.run(SURE, 12)
    machine.run(SURE, 150)
    assert machine.run(SURE, 1) == Plan([0], [31])
