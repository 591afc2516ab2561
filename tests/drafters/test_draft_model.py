"""The cache of an ordinary draft model holds what the target's holds, always."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from mlx_optiq_ext.drafters import DraftModelDrafter
from tests.helpers import (
    CHANGING,
    PARKED_THEN_NOT,
    assert_same_cache,
    assert_same_tokens,
    changing_depth,
    load_tiny,
)

PROMPT = mx.arange(3, 20)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_tiny("dense")


def take(model: nn.Module, num_tokens: int, prompt_cache: list[Any]) -> list[Any]:
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=DraftModelDrafter(model),
        max_tokens=-1,
        prompt_cache=prompt_cache,
        num_draft_tokens="auto",
    )
    taken = [next(steps) for _ in range(num_tokens)]
    steps.close()
    return taken


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 20, 90])
@pytest.mark.parametrize("pattern", [CHANGING, PARKED_THEN_NOT, (0,)])
def test_the_draft_model_has_seen_what_the_target_has(
    model: nn.Module, num_tokens: int, pattern: tuple[int, ...]
) -> None:
    prompt_cache = make_prompt_cache(model)
    num_entries = len(prompt_cache)
    with changing_depth(pattern):
        taken = take(model, num_tokens, prompt_cache)
    plain = generate_step(PROMPT, model, max_tokens=num_tokens)
    assert_same_tokens(list(plain), taken)
    # The draft model is the target itself, so the same tokens leave the same entries.
    assert_same_cache(prompt_cache[:num_entries], prompt_cache[num_entries:])


def test_drafting_after_a_pause_is_as_good_as_before(model: nn.Module) -> None:
    stats = SpeculationStats()
    with changing_depth(PARKED_THEN_NOT):
        list(
            spec_generate_step(
                PROMPT,
                model,
                drafter=DraftModelDrafter(model),
                max_tokens=200,
                num_draft_tokens="auto",
                stats=stats,
            )
        )
    assert stats.num_calls_per_depth[0] > 100
    assert stats.acceptance_rate == 1
