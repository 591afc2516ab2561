"""The MTP head's own cache is that of a head that has read every token, always."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from mlx_optiq_ext import SpeculationError, SpeculationStats, spec_generate_step
from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from tests.helpers import (
    CHANGING,
    DEMO,
    PARKED_THEN_NOT,
    assert_same_cache,
    changing_depth,
    load_tiny,
)

PROMPT = mx.arange(3, 20)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = load_tiny("dense")
    attach_mtp(model)
    return model


def primed_by(model: nn.Module, *runs: Any, **options: Any) -> list[Any]:
    """The entries of the head after generations that share a cache."""
    prompt_cache = make_prompt_cache(model)
    for prompt, num_tokens in runs:
        continue_(model, prompt, num_tokens, prompt_cache, **options)
    return prompt_cache[4:]


def continue_(
    model: nn.Module,
    prompt: mx.array,
    num_tokens: int,
    prompt_cache: list[Any],
    **options: Any,
) -> list[int]:
    steps = spec_generate_step(
        prompt, model, prompt_cache=prompt_cache, **{"max_tokens": -1, **options}
    )
    tokens = [token for token, *_ in (next(steps) for _ in range(num_tokens))]
    if num_tokens == 0:
        next(steps, None)
    steps.close()
    return tokens


def generated(model: nn.Module, num_tokens: int) -> mx.array:
    steps = generate_step(PROMPT, model, max_tokens=num_tokens)
    return mx.array([token for token, _ in steps])


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 7, 20, 90])
@pytest.mark.parametrize("pattern", [CHANGING, PARKED_THEN_NOT, (0,)])
def test_head_state_after_parked_decoding_is_that_of_prefill(
    model: nn.Module, num_tokens: int, pattern: tuple[int, ...]
) -> None:
    with changing_depth(pattern):
        decoded = primed_by(model, (PROMPT, num_tokens), num_draft_tokens="auto")
    everything = mx.concatenate([PROMPT, generated(model, num_tokens)])
    prefilled = primed_by(model, (everything, 0), max_tokens=0)
    assert_same_cache(prefilled, decoded)


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20])
def test_head_state_after_decoding_is_that_of_prefill(
    model: nn.Module, num_tokens: int, num_draft_tokens: int
) -> None:
    decoded = primed_by(model, (PROMPT, num_tokens), num_draft_tokens=num_draft_tokens)
    everything = mx.concatenate([PROMPT, generated(model, num_tokens)])
    prefilled = primed_by(model, (everything, 0), max_tokens=0)
    assert prefilled[0].offset == len(everything) - 1
    assert_same_cache(prefilled, decoded)


@pytest.mark.parametrize("num_tokens", range(1, 14))
def test_head_state_is_right_when_a_run_of_accepted_drafts_is_cut(
    num_tokens: int,
) -> None:
    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model)
    prompt = mx.array(tokenizer.encode("class Queue:\n    def __init__("))
    prompt_cache = make_prompt_cache(model)
    num_entries = len(prompt_cache)
    tokens = continue_(model, prompt, num_tokens, prompt_cache, num_draft_tokens=4)
    prefilled = make_prompt_cache(model)
    everything = mx.concatenate([prompt, mx.array(tokens)])
    continue_(model, everything, 0, prefilled, max_tokens=0)
    assert_same_cache(prefilled[num_entries:], prompt_cache[num_entries:])


@pytest.mark.parametrize("prefill_step_size", [1, 4, 2048])
def test_head_state_does_not_depend_on_the_chunks_of_the_prompt(
    model: nn.Module, prefill_step_size: int
) -> None:
    whole = primed_by(model, (PROMPT, 0), max_tokens=0)
    chunked = primed_by(
        model, (PROMPT, 0), max_tokens=0, prefill_step_size=prefill_step_size
    )
    assert_same_cache(whole, chunked)


def test_a_resumed_cache_keeps_the_head_primed(model: nn.Module) -> None:
    prompt_cache = make_prompt_cache(model)
    tokens = continue_(model, PROMPT, 9, prompt_cache)
    tokens += [5, 6, 7, *continue_(model, mx.array([5, 6, 7]), 4, prompt_cache)]
    everything = mx.concatenate([PROMPT, mx.array(tokens)])
    assert_same_cache(primed_by(model, (everything, 0), max_tokens=0), prompt_cache[4:])


def test_a_cache_from_a_file_keeps_the_head_primed(
    model: nn.Module, tmp_path: Path
) -> None:
    prompt_cache = make_prompt_cache(model)
    continue_(model, PROMPT, 3, prompt_cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), prompt_cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    one = continue_(model, mx.array([9]), 6, prompt_cache)
    other = continue_(model, mx.array([9]), 6, loaded)
    assert one == other
    assert_same_cache(prompt_cache, loaded)
    assert loaded[4].offset == loaded[3].offset - 1


def test_a_head_that_missed_tokens_starts_afresh(model: nn.Module) -> None:
    prompt_cache = make_prompt_cache(model)
    continue_(model, PROMPT, 3, prompt_cache)
    list(generate_step(PROMPT, model, prompt_cache=prompt_cache, max_tokens=4))
    num_missed = prompt_cache[3].offset
    expected = [
        token
        for token, _ in generate_step(
            mx.array([9, 9]),
            model,
            prompt_cache=deepcopy(prompt_cache[:4]),
            max_tokens=8,
        )
    ]
    assert continue_(model, mx.array([9, 9]), 8, prompt_cache) == expected
    assert prompt_cache[4].offset == prompt_cache[3].offset - num_missed - 1


def test_a_cache_filled_without_the_head_can_be_resumed(model: nn.Module) -> None:
    prompt_cache = make_prompt_cache(model)
    list(generate_step(PROMPT, model, prompt_cache=prompt_cache, max_tokens=4))
    first = continue_(model, mx.array([9]), 5, prompt_cache)
    second = continue_(model, mx.array([9]), 5, prompt_cache)
    assert len(first) == len(second) == 5
    assert prompt_cache[4].offset == prompt_cache[3].offset - 21 - 1


def test_entries_of_something_else_are_refused(model: nn.Module) -> None:
    prompt_cache = [*make_prompt_cache(model), KVCache()]
    with pytest.raises(SpeculationError, match="has KVCache, not"):
        next(spec_generate_step(PROMPT, model, prompt_cache=prompt_cache))


def test_plain_decoding_ignores_the_entries_of_the_head(model: nn.Module) -> None:
    prompt_cache = make_prompt_cache(model)
    continue_(model, PROMPT, 3, prompt_cache)
    alone = deepcopy(prompt_cache[:4])
    for options in ({}, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}):
        one, other = (
            list(
                generate_step(
                    PROMPT, model, prompt_cache=cache, max_tokens=5, **options
                )
            )
            for cache in (prompt_cache, alone)
        )
        assert [token for token, _ in one] == [token for token, _ in other]
    assert len(continue_(model, mx.array([9]), 5, prompt_cache)) == 5


def test_the_head_reads_image_embeddings_too(model: nn.Module) -> None:
    embedded = model.embed(PROMPT)
    with_tokens = primed_by(model, (PROMPT, 0), max_tokens=0)
    with_embeddings = primed_by(
        model, (mx.array([], mx.int32), 0), max_tokens=0, input_embeddings=embedded
    )
    assert_same_cache(with_tokens, with_embeddings)


def test_depth_beyond_one_drafts_from_the_heads_own_states(model: nn.Module) -> None:
    stats = SpeculationStats()
    list(
        spec_generate_step(
            PROMPT, model, num_draft_tokens=4, max_tokens=30, stats=stats
        )
    )
    assert len(stats.num_drafted_per_position) == 4
