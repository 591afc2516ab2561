"""Company changes nothing: sequences in a batch equal each alone, over a grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_optiq_ext.decoding._pass import Pass
from mlx_optiq_ext.rollback import Tape
from mlx_optiq_ext.rollback._batch import BatchKV
from tests.decoding import company


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    part = metafunc.config.getoption("--grid-part")
    if part is None:
        cases = company.covering_cases()
    else:
        index, num_parts = map(int, part.split("/"))
        every = itertools.islice(company.all_cases(), index - 1, None, num_parts)
        cases = list(every)
    metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def test_company_changes_nothing(case: company.Case) -> None:
    num_accepted = company.check(case)
    assert case.drafter == "own" or num_accepted > 0


FAULTY = company.Case(
    model="demo",
    num_sequences=3,
    drafter="own",
    num_draft_tokens=2,
    joins="one by one",
    leaves="cancelled",
    processors="all",
    caches="cold",
    prefill_step_size=512,
)


def a_mask_that_is_wider_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    make_mask = BatchKV.make_mask

    def wrong(self: BatchKV, N: int, *args: Any, **kwargs: Any) -> mx.array:
        mask = make_mask(self, N, *args, **kwargs)
        return mask | mx.roll(mask, 1, axis=-1)

    monkeypatch.setattr(BatchKV, "make_mask", wrong)


def positions_that_are_late_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BatchKV, "offset", property(lambda self: self._offsets.array + 1)
    )


def states_that_are_of_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = Tape.replayed
    monkeypatch.setattr(
        Tape,
        "replayed",
        lambda self, num_rows, *_, **__: replayed(self, mx.maximum(num_rows - 1, 0)),
    )


def processors_of_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Pass._rows

    def wrong(self: Pass, logits: mx.array, index: int) -> Any:
        sequences = self.sequences
        self.sequences = [*sequences[1:], sequences[0]]
        try:
            return judge(self, logits, index)
        finally:
            self.sequences = sequences

    monkeypatch.setattr(Pass, "_rows", wrong)


def a_leave_that_takes_a_neighbour_along(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = BatchKV.filter
    monkeypatch.setattr(
        BatchKV,
        "filter",
        lambda self, indices: keep(self, (indices + 1) % self._num_sequences),
    )


@pytest.mark.parametrize(
    "fault",
    [
        a_mask_that_is_wider_by_one,
        positions_that_are_late_by_one,
        states_that_are_of_the_row_before,
        processors_of_a_neighbour,
        a_leave_that_takes_a_neighbour_along,
    ],
)
def test_a_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    company.check(FAULTY)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        company.check(FAULTY)
