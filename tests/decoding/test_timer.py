"""Times of rounds that something else disturbed are told from the others."""

from __future__ import annotations

import pytest

from mlx_optiq_ext.decoding._timer import RoundTimer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def laps(pauses: list[float], seconds: float = 0.02) -> list[bool]:
    """Whether rounds are undisturbed, after each of which there is a pause."""
    clock = Clock()
    timer, found = RoundTimer(clock), []
    for pause in pauses:
        timer.pause()
        clock.now += pause
        timer.resume()
        clock.now += seconds
        found.append(timer.lap()[1])
    return found


def test_the_first_round_has_no_time() -> None:
    assert RoundTimer().lap() == (None, False)


def test_rounds_of_one_who_takes_tokens_at_once_are_undisturbed() -> None:
    assert all(laps([0.0001] * 20)[1:])


@pytest.mark.parametrize("usual", [0.0002, 0.01])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_a_burst_of_pauses_disturbs_its_rounds_only(usual: float, size: int) -> None:
    found = laps([usual] * 20 + [1.0] * size + [usual] * 4)
    assert found[10:] == [True] * 10 + [False] * size + [True] * 4


def test_one_who_is_always_slow_is_got_used_to() -> None:
    assert all(laps([0.05] * 20)[6:])


def test_the_time_of_a_round_is_from_the_one_before() -> None:
    clock = Clock()
    timer = RoundTimer(clock)
    timer.lap()
    clock.now += 3
    assert timer.lap() == (3, True)
