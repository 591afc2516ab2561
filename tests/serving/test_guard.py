"""A function of a sequence that raises is reported, and does no harm to others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler

from mlx_optiq_ext.decoding._acceptance import (
    ExactMatch,
    SpeculativeSampling,
    is_pure,
    rule_for,
)
from mlx_optiq_ext.serving._guard import guard_processors, guard_sampler

LOGITS = mx.array([[0.0, 2.0, 1.0]])
TOKENS = mx.array([0])


def broken(*args: Any) -> Any:
    raise RuntimeError("broken on purpose")


def test_what_works_is_called() -> None:
    reports: list[Exception] = []
    sampler = guard_sampler(lambda logprobs: mx.argmin(logprobs, -1), reports.append)
    (processor,) = guard_processors([lambda _, logits: -logits], reports.append)
    assert sampler(LOGITS).item() == 0
    assert processor(TOKENS, LOGITS).tolist() == (-LOGITS).tolist()
    assert not reports


@pytest.mark.parametrize("wrong", [broken, lambda *_: mx.zeros((2, 7))])
def test_a_failure_is_reported_once_and_passed_over(wrong: Any) -> None:
    reports: list[Exception] = []
    sampler = guard_sampler(wrong, reports.append)
    (processor,) = guard_processors([wrong], reports.append)
    for _ in range(2):
        assert sampler(LOGITS).item() == 1
        assert processor(TOKENS, LOGITS).tolist() == LOGITS.tolist()
    assert len(reports) == 2


def test_a_sampler_that_a_batch_shares_stays_the_same_object() -> None:
    assert guard_sampler(make_sampler(0.0), print) is greedy_sampler


def test_guarded_functions_are_known_for_what_they_are() -> None:
    made = guard_sampler(make_sampler(0.5), print)
    assert isinstance(rule_for(made), SpeculativeSampling)
    assert isinstance(rule_for(guard_sampler(broken, print)), ExactMatch)
    processors = make_logits_processors({1: 1.0}, 1.1, 20, 0.5, 20, 0.5)
    assert all(map(is_pure, guard_processors(processors, print)))
    assert not any(map(is_pure, guard_processors([broken], print)))
