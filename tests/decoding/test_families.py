"""Copies of the context change nothing, in any family of models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from tests.families import FAMILIES, tiny
from tests.helpers import assert_same_cache, assert_same_tokens

NUM_TOKENS = 80
PASSAGE = [5, 17, 3, 29, 41, 8, 11, 60, 2, 33, 7, 52, 19, 44, 23]
# What is written about the passage: whole, with other words, in part, and new.
TEXT = [
    *PASSAGE[:9],
    70,
    *PASSAGE[10:],
    71,
    *PASSAGE[3:8],
    72,
    73,
    *PASSAGE,
    *PASSAGE[:6],
    74,
    75,
    76,
    *PASSAGE,
    77,
    78,
    79,
]
PROMPT = mx.array([1, *PASSAGE, 4])


def writer() -> Callable[[mx.array], mx.array]:
    """A sampler of somebody who knows what to write, whatever is probable."""
    tokens = itertools.cycle(TEXT)
    return lambda logprobs: mx.array([next(tokens)])


def check(
    model: nn.Module, num_draft_tokens: Any, sampler: Any = None
) -> SpeculationStats:
    """Compare with plain decoding: tokens, log probabilities, the cache, what follows.

    Half of the generation is one call and half another, with the same cache.
    """
    stats = SpeculationStats()
    caches = make_prompt_cache(model), make_prompt_cache(model)
    prompts = PROMPT, mx.array([6])
    for prompt, num_tokens in zip(prompts, (NUM_TOKENS, 12), strict=True):
        samplers = (sampler(), sampler()) if sampler else (None, None)
        speculative = list(
            spec_generate_step(
                prompt,
                model,
                prompt_lookup=True,
                num_draft_tokens=num_draft_tokens,
                max_tokens=num_tokens,
                sampler=samplers[0],
                prompt_cache=caches[0],
                stats=stats,
            )
        )
        plain = list(
            generate_step(
                prompt,
                model,
                max_tokens=num_tokens,
                sampler=samplers[1],
                prompt_cache=caches[1],
            )
        )
        assert_same_tokens(plain, speculative)
        assert_same_cache(caches[1], caches[0])
    return stats


@pytest.mark.parametrize("num_draft_tokens", [3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_that_are_right_and_wrong_change_nothing(
    family: str, num_draft_tokens: int
) -> None:
    stats = check(tiny(family), num_draft_tokens, writer)
    assert stats.num_accepted > 30
    assert stats.num_drafted > stats.num_accepted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_probable_tokens_are_those_of_plain_decoding(family: str) -> None:
    check(tiny(family), "auto")
