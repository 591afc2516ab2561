"""``generate`` and ``stream_generate`` with ``mtp=``, and with a draft model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm import generate, stream_generate
from mlx_lm.generate import GenerationResponse, generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_optiq_ext
from mlx_optiq_ext.patches._speculation import Speculation
from tests.helpers import (
    DEMO,
    ScriptedDrafter,
    assert_same_cache,
    assert_same_tokens,
    load_tiny,
)

PROMPT = "def read(path):\n"


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, TokenizerWrapper]:
    return mlx_lm.load(str(DEMO))


def comparable(responses: list[GenerationResponse]) -> list[Any]:
    """What must not differ; speeds and memory may."""
    return [
        (
            response.text,
            response.token,
            response.prompt_tokens,
            response.generation_tokens,
            response.finish_reason,
        )
        for response in responses
    ]


@pytest.mark.parametrize("num_draft_tokens", [None, 1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 1},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 30},
        {"logits_processors": make_logits_processors(repetition_penalty=1.3)},
        {"prefill_step_size": 3},
        {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)},
    ],
)
def test_responses_are_those_of_plain_decoding(
    demo: Any, options: dict[str, Any], num_draft_tokens: int | None
) -> None:
    options = {"max_tokens": 60, **options}
    plain = list(stream_generate(*demo, PROMPT, **options))
    speculative = list(
        stream_generate(
            *demo, PROMPT, mtp=True, num_draft_tokens=num_draft_tokens, **options
        )
    )
    assert comparable(plain) == comparable(speculative)
    for one, other in zip(plain, speculative, strict=True):
        assert mx.array_equal(one.logprobs, other.logprobs)
    stats = speculative[-1].speculation
    assert stats.num_tokens == len(speculative)
    assert stats.num_accepted == sum(r.from_draft for r in speculative)
    assert not hasattr(plain[-1], "speculation")


def test_generate_takes_and_prints_what_stream_generate_does(
    demo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generate(*demo, PROMPT, max_tokens=40, verbose=True)
    printed = capsys.readouterr().out
    speculative = generate(
        *demo, PROMPT, max_tokens=40, verbose=True, mtp=True, num_draft_tokens=2
    )
    printed_too = capsys.readouterr().out.splitlines()
    assert plain == speculative
    assert "Speculation" not in printed
    assert printed_too[-1].startswith("Speculation: ")
    assert printed_too[-1].endswith("%)")
    assert len(printed_too) == len(printed.splitlines()) + 1


@pytest.mark.parametrize("off", [None, False])
def test_no_request_is_plain_decoding(demo: Any, off: Any) -> None:
    plain = list(stream_generate(*demo, PROMPT, max_tokens=9))
    asked_not_to = list(stream_generate(*demo, PROMPT, max_tokens=9, mtp=off))
    assert comparable(plain) == comparable(asked_not_to)
    assert not hasattr(asked_not_to[-1], "speculation")


@pytest.mark.parametrize("source", [str(DEMO), DEMO])
def test_a_path_names_the_head(demo: Any, source: str | Path) -> None:
    text = generate(*demo, PROMPT, max_tokens=20, mtp=source)
    assert text == generate(*demo, PROMPT, max_tokens=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp": 3}, "mtp must be True, False or a path, got 3"),
        ({"mtp": ""}, "mtp must be True, False or a path, got ''"),
        ({"mtp": ["x"]}, "got \\['x'\\]"),
        ({"mtp": True, "num_draft_tokens": 0}, "from 1 to 8, got 0"),
        ({"draft_vocab": 64}, "draft_vocab needs mtp"),
        ({"mtp": True, "draft_vocab": 0}, "positive whole number"),
        ({"mtp_bits": 4}, "mtp_bits needs mtp"),
        ({"mtp": True, "mtp_bits": 7}, "2, 3, 4, 5, 6 or 8, got 7"),
        ({"mtp": True, "num_draft_tokens": "3"}, "from 1 to 8, got '3'"),
        ({"mtp": True, "draft_model": nn.Linear(1, 1)}, "exclude each other"),
    ],
)
def test_a_malformed_request_is_an_error_at_once(
    demo: Any, options: dict[str, Any], message: str
) -> None:
    for function in (generate, stream_generate):
        with pytest.raises(ValueError, match=message):
            function(*demo, PROMPT, **options)


def test_a_model_without_a_head_is_an_error_that_says_what_to_do() -> None:
    model, tokenizer = tiny_llama(), mlx_lm.load(str(DEMO))[1]
    with pytest.raises(mlx_optiq_ext.SpeculationError, match="llama"):
        generate(model, tokenizer, PROMPT, mtp=True)


@pytest.mark.parametrize("position", range(5, 25))
def test_an_end_token_inside_an_accepted_run_ends_the_text(
    demo: Any, position: int
) -> None:
    model, tokenizer = demo[0], deepcopy(demo[1])
    prompt = mx.array(tokenizer.encode(PROMPT))
    script = [token for token, _ in generate_step(prompt, model, max_tokens=40)]
    tokenizer.eos_token_ids = {script[position]}
    caches = make_prompt_cache(model), make_prompt_cache(model)
    drafter = ScriptedDrafter(script, model.language_model.args.vocab_size, bool)
    plain, speculative = (
        stream_generate(
            model, tokenizer, PROMPT, prompt_cache=prompt_cache, draft_model=draft
        )
        for prompt_cache, draft in zip(
            caches, (None, Speculation(drafter, 4)), strict=True
        )
    )
    expected, found = until_finished(plain), until_finished(speculative)
    # Neither generator has ended or was closed.
    assert_same_cache(*caches)
    assert comparable(expected) == comparable(found)
    assert expected[-1].finish_reason == "stop"


def until_finished(responses: Iterator[GenerationResponse]) -> list[GenerationResponse]:
    """Responses up to the last, which is not waited past."""
    taken = [next(responses)]
    while taken[-1].finish_reason is None:
        taken.append(next(responses))
    return taken


def test_the_cache_is_settled_when_the_last_response_arrives(demo: Any) -> None:
    model, tokenizer = demo
    caches = make_prompt_cache(model), make_prompt_cache(model)
    generators = [
        stream_generate(
            model, tokenizer, PROMPT, prompt_cache=prompt_cache, max_tokens=20, mtp=mtp
        )
        for prompt_cache, mtp in zip(caches, (False, True), strict=True)
    ]
    for responses in generators:
        until_finished(responses)
    assert_same_cache(caches[0], caches[1][: len(caches[0])])


def test_a_consumer_that_leaves_early_leaves_a_settled_cache(demo: Any) -> None:
    model, tokenizer = demo
    caches = make_prompt_cache(model), make_prompt_cache(model)
    for prompt_cache, mtp in zip(caches, (False, True), strict=True):
        for response in stream_generate(
            model, tokenizer, PROMPT, prompt_cache=prompt_cache, mtp=mtp
        ):
            if response.generation_tokens == 13:
                break
    assert_same_cache(caches[0], caches[1][: len(caches[0])])


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_what_was_generated_with_is_let_go(num_tokens: int) -> None:
    model, tokenizer = mlx_lm.load(str(DEMO))
    cache = make_prompt_cache(model)
    options: dict[str, Any] = {"prompt_cache": cache, "max_tokens": 20, "mtp": True}
    for response in stream_generate(model, tokenizer, PROMPT, **options):
        if response.generation_tokens == num_tokens:
            break
    held = ref(model), ref(cache[0])
    del model, tokenizer, cache, options, response
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_options_that_a_draft_model_would_lose_are_kept(demo: Any) -> None:
    calls: list[Any] = []
    list(
        stream_generate(
            *demo,
            PROMPT,
            max_tokens=2,
            mtp=True,
            max_kv_size=64,
            prompt_progress_callback=lambda *call: calls.append(call),
        )
    )
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1]


def tiny_llama(seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=2048,
            tie_word_embeddings=True,
        )
    )


def test_a_draft_model_works_for_a_recurrent_target(demo: Any) -> None:
    model, tokenizer = demo
    plain = list(stream_generate(model, tokenizer, PROMPT, max_tokens=50))
    for draft_model in (model, tiny_llama()):
        speculative = list(
            stream_generate(
                model,
                tokenizer,
                PROMPT,
                max_tokens=50,
                draft_model=draft_model,
                num_draft_tokens=3,
            )
        )
        assert comparable(plain) == comparable(speculative)
        assert speculative[-1].speculation.num_rounds > 0
    # The target itself is the perfect draft model, up to the last rounds.
    own = stream_generate(
        model, tokenizer, PROMPT, max_tokens=50, draft_model=model, num_draft_tokens=3
    )
    assert [r.from_draft for r in own][1:45] == [True, True, True, False] * 11


def test_a_recurrent_draft_model_can_be_resumed(demo: Any) -> None:
    model, tokenizer = demo
    draft_model, _ = mlx_lm.load(str(DEMO))
    plain_cache = make_prompt_cache(model)
    own_cache = make_prompt_cache(model) + make_prompt_cache(draft_model)
    for text in (PROMPT, "    return"):
        plain, speculative = (
            list(
                stream_generate(
                    model, tokenizer, text, max_tokens=21, prompt_cache=cache, **options
                )
            )
            for cache, options in (
                (plain_cache, {}),
                (own_cache, {"draft_model": draft_model, "num_draft_tokens": 2}),
            )
        )
        assert comparable(plain) == comparable(speculative)
        assert speculative[-1].speculation.acceptance_rate > 0.9
    num_entries = len(plain_cache)
    assert_same_cache(plain_cache, own_cache[:num_entries])
    assert_same_cache(plain_cache, own_cache[num_entries:])


@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_a_draft_model_is_left_with_the_tokens_that_were_taken(
    demo: Any, num_tokens: int
) -> None:
    model, tokenizer = demo
    prompt_cache = make_prompt_cache(model) + make_prompt_cache(model)
    responses = stream_generate(
        model,
        tokenizer,
        PROMPT,
        prompt_cache=prompt_cache,
        draft_model=model,
        num_draft_tokens=3,
    )
    for _ in range(num_tokens):
        next(responses)
    responses.close()
    num_entries = len(prompt_cache) // 2
    assert_same_cache(prompt_cache[:num_entries], prompt_cache[num_entries:])


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("draft_seed", [0, 1])
def test_a_draft_model_works_past_the_window_of_a_ring(
    keep: int, draft_seed: int
) -> None:
    model, draft_model = tiny_llama(), tiny_llama(draft_seed)
    tokenizer = mlx_lm.load(str(DEMO))[1]

    def rings() -> list[Any]:
        return [RotatingKVCache(max_size=24, keep=keep) for _ in model.layers]

    plain_cache, own_cache = rings(), rings() + rings()
    # The second turn finds rings that are full: there mlx-lm refuses.
    for text in (PROMPT, "    return path"):
        plain, speculative = (
            list(
                stream_generate(
                    model, tokenizer, text, max_tokens=60, prompt_cache=cache, **options
                )
            )
            for cache, options in (
                (plain_cache, {}),
                (own_cache, {"draft_model": draft_model}),
            )
        )
        assert comparable(plain) == comparable(speculative)
        for one, other in zip(plain, speculative, strict=True):
            assert mx.array_equal(one.logprobs, other.logprobs)
    assert_same_cache(plain_cache, own_cache[: len(plain_cache)])


def test_a_draft_model_that_mlx_lm_can_roll_back_is_left_to_mlx_lm() -> None:
    model, tokenizer = tiny_llama(), mlx_lm.load(str(DEMO))[1]
    responses = list(
        stream_generate(
            model, tokenizer, PROMPT, max_tokens=9, draft_model=tiny_llama(1)
        )
    )
    assert not hasattr(responses[-1], "speculation")


def test_a_sampled_text_depends_on_the_seed_alone(demo: Any) -> None:
    def text(seed: int) -> str:
        mx.random.seed(seed)
        sampler = make_sampler(temp=1.0, top_p=0.95, top_k=20)
        return generate(*demo, PROMPT, max_tokens=40, mtp=True, sampler=sampler)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_disabled_means_untouched(demo: Any) -> None:
    mlx_optiq_ext.disable()
    try:
        with pytest.raises(TypeError, match="mtp"):
            generate(*demo, PROMPT, mtp=True)
        with pytest.raises(ValueError, match="trimmable"):
            generate(*demo, PROMPT, draft_model=demo[0])
    finally:
        mlx_optiq_ext.enable()
    assert generate(*demo, PROMPT, mtp=True, max_tokens=5)


def test_without_the_patches_the_loop_still_equals_plain_decoding() -> None:
    model = load_tiny("dense")
    prompt = mx.arange(1, 9)
    expected = list(generate_step(prompt, model, max_tokens=20))
    mlx_optiq_ext.disable()
    try:
        found = list(
            mlx_optiq_ext.spec_generate_step(
                prompt, model, max_tokens=20, num_draft_tokens=3
            )
        )
    finally:
        mlx_optiq_ext.enable()
    assert_same_tokens(expected, found)
