"""``batch_generate`` speculates when it is told to, and is mlx-lm's otherwise."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_optiq_ext import SpeculationError
from mlx_optiq_ext.drafters import DraftModelDrafter
from tests.helpers import DEMO

TEXTS = ("class Queue:\n", "def read(path):\n    with open(", "import os\n")
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def demo() -> Any:
    model, tokenizer = mlx_lm.load(str(DEMO))
    return model, tokenizer, [tokenizer.encode(text) for text in TEXTS]


def generated(demo: Any, **options: Any) -> Any:
    model, tokenizer, prompts = demo
    return batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=MAX_TOKENS,
        return_prompt_caches=True,
        return_token_ids=True,
        return_logprobs=True,
        **options,
    )


def test_the_response_is_that_of_mlx_lm_with_counts(demo: Any) -> None:
    plain = generated(demo)
    assert not hasattr(plain, "speculation")
    for number in (1, 3):
        found = generated(demo, mtp=True, num_draft_tokens=number)
        assert found.texts == plain.texts
        assert found.token_ids == plain.token_ids
        assert found.stats.generation_tokens == plain.stats.generation_tokens
        for one, other in zip(found.caches, plain.caches, strict=True):
            sizes = [getattr(entry, "offset", None) for entry in other]
            assert [getattr(x, "offset", None) for x in one[: len(other)]] == sizes
        assert len(found.speculation) == len(TEXTS)
        for stats in found.speculation:
            assert stats.num_accepted > 0
            assert stats.num_tokens == MAX_TOKENS


def test_caches_and_logprobs_are_those_of_each_prompt_alone(demo: Any) -> None:
    model, tokenizer, prompts = demo
    found = generated(demo, mtp=True, num_draft_tokens=2)
    for index, prompt in enumerate(prompts):
        prompt_cache = make_prompt_cache(model)
        responses = mlx_lm.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=MAX_TOKENS,
            prompt_cache=prompt_cache,
        )
        alone = [(r.token, r.logprobs[r.token].item()) for r in responses]
        assert found.token_ids[index] == [token for token, _ in alone]
        assert found.logprobs[index] == [logprob for _, logprob in alone]
        # mlx-lm's generator stops one token short of what a batch leaves.
        assert found.caches[index][3].offset == len(prompt) + MAX_TOKENS


def test_caches_that_are_given_stay_as_they_are(demo: Any) -> None:
    model, tokenizer, prompts = demo
    caches = [make_prompt_cache(model) for _ in prompts]
    for prompt, prompt_cache in zip(prompts, caches, strict=True):
        model(mx.array([prompt[:2]]), cache=prompt_cache)
    sizes = [cache_[3].offset for cache_ in caches]
    rest = [prompt[2:] for prompt in prompts]
    texts = []
    for options in ({}, {"mtp": True, "num_draft_tokens": 2}):
        response = batch_generate(
            model, tokenizer, rest, prompt_caches=caches, max_tokens=12, **options
        )
        texts.append(response.texts)
        assert [cache_[3].offset for cache_ in caches] == sizes
    assert texts[0] == texts[1]


def test_other_options_are_those_of_the_generator(demo: Any) -> None:
    options = {"completion_batch_size": 2, "prefill_batch_size": 1}
    found = generated(demo, mtp=True, num_draft_tokens=2, **options)
    assert found.token_ids == generated(demo, **options).token_ids
    with pytest.raises(TypeError, match="no_such_option"):
        generated(demo, mtp=True, no_such_option=1)


def test_a_draft_model_drafts_for_several(demo: Any) -> None:
    found = generated(demo, draft=DraftModelDrafter(demo[0]), num_draft_tokens=2)
    assert found.token_ids == generated(demo).token_ids
    assert all(stats.acceptance_rate > 0.9 for stats in found.speculation)


def test_no_request_is_mlx_lms_own(demo: Any) -> None:
    for options in ({"mtp": False}, {"mtp": None}, {"draft": None}):
        assert not hasattr(generated(demo, **options), "speculation")


def test_what_cannot_be_is_one_clear_error(demo: Any) -> None:
    with pytest.raises(SpeculationError, match="Cannot speculate"):
        generated(demo, mtp="/nope")
    with pytest.raises(ValueError, match="from 1 to 8"):
        generated(demo, mtp=True, num_draft_tokens=9)
    with pytest.raises(ValueError, match="exclude each other"):
        generated(demo, mtp=True, draft="x")


def test_generators_made_later_are_mlx_lms_own(demo: Any) -> None:
    generated(demo, mtp=True)
    assert type(BatchGenerator(demo[0])) is BatchGenerator


def test_sampling_is_reproducible(demo: Any) -> None:
    def tokens(seed: int) -> Any:
        mx.random.seed(seed)
        sampler = make_sampler(temp=1.0, top_k=50)
        return generated(demo, mtp=True, sampler=sampler).token_ids

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_the_benchmark_takes_a_batch(
    batch_size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm import benchmark

    flags = ["--model", str(DEMO), "--mtp", "-b", batch_size, "-p", "32", "-g", "12"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.benchmark", *flags, "-n", "1"])
    benchmark.main()
    assert "generation_tps" in capsys.readouterr().out
