"""Speculation equals plain decoding to the bit, over a grid of cases."""

from __future__ import annotations

import itertools

import pytest

from tests.decoding import grid


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    part = metafunc.config.getoption("--grid-part")
    if part is None:
        cases = [case for one in grid.GRIDS for case in grid.covering_cases(one)]
    else:
        index, num_parts = map(int, part.split("/"))
        cases = list(itertools.islice(grid.all_cases(), index - 1, None, num_parts))
    metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def test_speculation_equals_plain_decoding(case: grid.Case) -> None:
    stats = grid.check(case)
    may_accept = case.drafter == "script" and case.max_tokens == grid.NUM_TOKENS
    assert not may_accept or stats.num_accepted > 0
