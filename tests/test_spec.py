"""The API that mlx-optiq published, with another import line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model, load_tokenizer

import mlx_optiq_ext
from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.spec import (
    GemmaAssistantDrafter,
    SpecConfig,
    SpecEvent,
    spec_generate,
)
from tests.gemma import A4B, E4B, add_tokenizer, assistant_folder, copy, target_folder
from tests.helpers import DEMO, assert_same_cache

PROMPT = "w5 w9 w3 w44"
WINDOW = 64  # Below it, speculation is exact.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "target"
    return add_tokenizer(
        copy(target_folder(E4B), path, lambda c: c.update(sliding_window=WINDOW))
    )


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any, Any]:
    """The target, its drafter and the tokenizer."""
    target, _ = load_model(folder)
    tokenizer = load_tokenizer(folder)
    drafter = GemmaAssistantDrafter.from_pretrained(str(assistant_folder(E4B)))
    return target, drafter, tokenizer


def plain(parts: Any, prompt: Any, max_tokens: int) -> list[Any]:
    target, _, tokenizer = parts
    return list(stream_generate(target, tokenizer, prompt, max_tokens))


def test_the_published_lines_run(parts, capsys):
    target, drafter, tokenizer = parts
    prompt = PROMPT
    for ev in spec_generate(target, drafter, tokenizer, prompt, SpecConfig(gamma=1)):
        if ev.kind == "token":
            print(ev.text, end="", flush=True)  # noqa: T201 - as published
    expected = "".join(r.text for r in plain(parts, prompt, 256))
    assert capsys.readouterr().out == expected
    assert len(expected.split()) > 10


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, [5, 9, 3], mx.array([5, 9, 3]), "w2 w5 w7"])
def test_events_are_the_responses_of_plain_decoding(parts, prompt, num_draft_tokens):
    config = SpecConfig(num_draft_tokens=num_draft_tokens, max_tokens=25)
    target, drafter, tokenizer = parts
    *tokens, last = spec_generate(target, drafter, tokenizer, prompt, config)
    expected = plain(parts, prompt, 25)
    assert [e.token_id for e in tokens] == [r.token for r in expected]
    assert [e.text for e in tokens] == [r.text for r in expected]
    assert {e.kind for e in tokens} == {"token"}
    assert all(e.stats is None for e in tokens)
    assert last == SpecEvent("done", stats=last.stats)
    stats = last.stats
    assert stats.num_emitted == len(tokens) == 25
    assert stats.num_accepted == sum(e.from_draft for e in tokens)
    # The last rounds may not emit as many as others.
    assert stats.num_drafted > num_draft_tokens * (stats.num_target_calls - 4)
    assert stats.num_target_calls + stats.num_accepted == 25
    assert 0 < stats.elapsed_seconds < 60
    assert stats.acceptance_rate == stats.num_accepted / stats.num_drafted


@pytest.mark.parametrize("max_tokens", [1, 7, 40])
def test_a_model_with_a_head_needs_no_other_drafter(max_tokens):
    """And what a detokeniser holds back comes with the last token."""
    target, tokenizer = mlx_lm.load(str(DEMO))
    messages = [{"role": "user", "content": "Write a function that reads a file"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    config = SpecConfig(gamma=2, max_tokens=max_tokens)
    *tokens, last = spec_generate(target, None, tokenizer, prompt, config)
    expected = plain((target, None, tokenizer), prompt, max_tokens)
    assert [(e.token_id, e.text) for e in tokens] == [
        (r.token, r.text) for r in expected
    ]
    assert last.stats.num_accepted == sum(e.from_draft for e in tokens)
    assert (last.stats.num_accepted > 0) == (max_tokens > 1)


def test_bytes_that_are_cut_off_come_with_the_last_token():
    target, tokenizer = mlx_lm.load(str(DEMO))
    first_byte, _ = tokenizer.encode("\u00e9")
    config = SpecConfig(
        max_tokens=3,
        logits_processors=[
            lambda tokens, logits: mx.where(
                mx.arange(logits.shape[-1]) == first_byte, 0.0, -mx.inf
            )[None]
        ],
    )
    *tokens, _ = spec_generate(target, None, tokenizer, "def", config)
    options = {"max_tokens": 3, "logits_processors": config.logits_processors}
    expected = list(stream_generate(target, tokenizer, "def", **options))
    assert [e.text for e in tokens] == [r.text for r in expected]
    assert tokens[-1].text != ""


def test_any_end_of_text_ends_it(parts):
    target, drafter, tokenizer = parts
    tokens = [r.token for r in plain(parts, PROMPT, 20)]
    tokenizer = load_tokenizer(record_of(target).source, eos_token_ids=[1, tokens[7]])
    num_before = tokens.index(tokens[7])
    *events, last = spec_generate(target, drafter, tokenizer, PROMPT)
    assert [e.token_id for e in events] == tokens[: num_before + 1]
    assert events[-1].text == ""
    assert last.stats.num_emitted == num_before + 1
    expected = plain((target, drafter, tokenizer), PROMPT, 256)
    assert "".join(e.text for e in events) == "".join(r.text for r in expected)


def test_options_of_mlx_lm_are_passed_on(parts):
    target, drafter, tokenizer = parts
    processors = make_logits_processors(repetition_penalty=1.5)
    caches = [make_prompt_cache(target) for _ in range(2)]
    config = SpecConfig(
        gamma=2,
        max_tokens=12,
        sampler=lambda logprobs: mx.argmin(logprobs, axis=-1),
        logits_processors=processors,
        prompt_cache=caches[1],
        prefill_step_size=2,
    )
    events = list(spec_generate(target, drafter, tokenizer, [5, 9, 3, 4, 8], config))
    expected = generate_step(
        mx.array([5, 9, 3, 4, 8]),
        target,
        max_tokens=12,
        sampler=config.sampler,
        logits_processors=processors,
        prompt_cache=caches[0],
        prefill_step_size=2,
    )
    assert [e.token_id for e in events[:-1]] == [token for token, _ in expected]
    assert_same_cache(*caches)


def test_quantised_caches_are_passed_on(parts):
    target, drafter, tokenizer = parts
    config = SpecConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    with pytest.raises(NotImplementedError, match="RotatingKVCache"):
        list(spec_generate(target, drafter, tokenizer, PROMPT, config))


def test_a_text_may_be_left_before_its_end(parts):
    target, drafter, tokenizer = parts
    cache = make_prompt_cache(target)
    config = SpecConfig(prompt_cache=cache, num_draft_tokens=2)
    events = spec_generate(target, drafter, tokenizer, [5, 9, 3], config)
    for _ in range(6):
        next(events)
    events.close()
    assert cache[0].offset == 3 + 6


def test_the_drafter_may_be_a_path_or_a_model(parts):
    target, _, tokenizer = parts
    expected = [r.token for r in plain(parts, PROMPT, 9)]
    other, _ = load_model(target_folder(A4B))
    for drafter in (assistant_folder(E4B), str(assistant_folder(E4B)), other):
        config = SpecConfig(max_tokens=9)
        events = list(spec_generate(target, drafter, tokenizer, PROMPT, config))
        assert [e.token_id for e in events[:-1]] == expected


def test_a_tokenizer_of_transformers_is_wrapped(parts):
    target, drafter, tokenizer = parts
    inner = tokenizer._tokenizer
    events = spec_generate(target, drafter, inner, PROMPT, SpecConfig(max_tokens=3))
    assert [e.token_id for e in events][:-1] == [
        r.token for r in plain(parts, PROMPT, 3)
    ]


def test_drawn_text_is_that_of_the_seed(parts):
    target, drafter, tokenizer = parts
    config = SpecConfig(gamma=2, max_tokens=10, sampler=make_sampler(temp=1.0))
    texts = []
    for _ in range(2):
        mx.random.seed(1)
        events = spec_generate(target, drafter, tokenizer, PROMPT, config)
        texts.append([event.token_id for event in events])
    assert texts[0] == texts[1]


def test_no_patch_of_mlx_lm_is_needed(parts):
    target, drafter, tokenizer = parts
    mlx_optiq_ext.disable()
    try:
        config = SpecConfig(max_tokens=5)
        events = list(spec_generate(target, drafter, tokenizer, PROMPT, config))
        assert len(events) == 6
    finally:
        mlx_optiq_ext.enable()


@pytest.mark.parametrize(
    "drafter", [7, "", "no/such/thing", assistant_folder(A4B).with_name("gone")]
)
def test_a_drafter_that_is_none_fails_before_the_first_event(parts, drafter):
    target, _, tokenizer = parts
    with pytest.raises(ValueError, match=r"must be a drafter|is no folder here"):
        spec_generate(target, drafter, tokenizer, PROMPT)


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (SpecConfig(), 1),
        (SpecConfig(gamma=3), 3),
        (SpecConfig(3), 3),
        (SpecConfig(num_draft_tokens=8), 8),
        (SpecConfig(gamma=2, num_draft_tokens=2), 2),
        (dataclasses.replace(SpecConfig(gamma=4), max_tokens=7), 4),
    ],
)
def test_gamma_is_the_number_of_draft_tokens(config, number):
    assert config.gamma == config.num_draft_tokens == number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "from 1 to 8, got 0"),
        ({"gamma": 9}, "from 1 to 8, got 9"),
        ({"num_draft_tokens": True}, "from 1 to 8, got True"),
        ({"num_draft_tokens": 1.5}, r"from 1 to 8, got 1\.5"),
        ({"gamma": 1, "num_draft_tokens": 2}, "are the same thing, got 1 and 2"),
        ({"max_tokens": 0}, "max_tokens must be .*, got 0"),
        ({"max_tokens": -2}, "got -2"),
        ({"max_tokens": "9"}, "got '9'"),
        ({"prefill_step_size": 0}, "prefill_step_size must be .*, got 0"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpecConfig(**options)


def test_settings_do_not_change():
    config = SpecConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 2
    assert not hasattr(config, "__dict__")


def test_the_drafter_is_a_public_name_of_the_package():
    assert mlx_optiq_ext.GemmaAssistantDrafter is GemmaAssistantDrafter
