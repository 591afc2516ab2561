"""Plain and speculative decoding side by side."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from mlx_optiq_ext import _comparing
from tests.helpers import DEMO

NUM_TOKENS = 24
VARIANTS = [{"mtp": True, "num_draft_tokens": depth} for depth in (1, 2)]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load(str(DEMO))


@pytest.fixture(scope="module")
def prompt(loaded: Any) -> list[int]:
    return _comparing.chat_prompt(loaded[1], _comparing.PROMPTS["code"])


def test_a_comparison_has_the_speeds_and_counts_of_both(loaded, prompt):
    one, two = _comparing.compare(*loaded, prompt, VARIANTS, max_tokens=NUM_TOKENS)
    assert one.is_identical
    assert two.is_identical
    assert one.plain_tps == two.plain_tps > 0
    assert one.speed_up == one.speculative_tps / one.plain_tps
    assert one.num_tokens == one.stats.num_tokens == NUM_TOKENS
    assert len(one.stats.num_drafted_per_position) == 1
    assert len(two.stats.num_drafted_per_position) == 2


def test_repeated_runs_have_the_median_of_their_speeds():
    speeds = [(1.0, 5.0), (9.0, 6.0), (2.0, 70.0)]
    runs = [[_comparing.Decoded([], tps) for tps in repeat] for repeat in speeds]
    assert _comparing.median_tps(runs) == [2.0, 6.0]


def test_a_difference_has_its_position_and_the_margin_of_plain_decoding(loaded, prompt):
    model, tokenizer = loaded
    steps = list(generate_step(mx.array(prompt), model, max_tokens=8))
    plain = [token for token, _ in steps]
    other = [*plain[:5], plain[5] + 1, *plain[6:]]
    found = _comparing.find_difference(model, tokenizer, prompt, plain, other)
    second, best = np.sort(np.array(steps[5][1]))[-2:]
    assert found is not None
    assert found.position == 5
    assert found.margin == pytest.approx(best - second, abs=1e-5)


def test_equal_outputs_have_no_difference(loaded, prompt):
    assert _comparing.find_difference(*loaded, prompt, [4, 5], [4, 5]) is None


def test_a_text_ends_where_the_model_ends_it(loaded):
    model, tokenizer = loaded
    prompt = _comparing.chat_prompt(tokenizer, _comparing.PROMPTS["dialogue"])
    decoded = _comparing.decode(model, tokenizer, prompt, 300, {})
    assert len(decoded.tokens) < 300
    assert decoded.tokens[-1] in tokenizer.eos_token_ids
    assert decoded.stats is None


@pytest.mark.parametrize("has_template", [True, False])
def test_a_prompt_is_put_in_the_chat_template_if_there_is_one(loaded, has_template):
    class Tokenizer:
        has_chat_template = has_template
        encode = loaded[1].encode
        apply_chat_template = loaded[1].apply_chat_template

    text = loaded[1].decode(_comparing.chat_prompt(Tokenizer(), "Hello"))
    assert ("<|im_start|>" in text) == has_template
