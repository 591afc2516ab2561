"""Copies of the context, asked for by arguments and by flags of mlx-lm's commands."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import batch_generate, generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_optiq_ext import SpeculativeBatchGenerator
from tests.helpers import CODE, CODE_AGAIN, DEMO
from tests.processes import run_command as run

FLAGS = ("--model", DEMO, "--prompt", CODE_AGAIN, "--ignore-chat-template", "-m", 60)


@pytest.fixture(scope="module")
def demo() -> Any:
    return mlx_lm.load(str(DEMO))


@pytest.mark.parametrize("options", [{}, {"mtp": True}], ids=["alone", "with a head"])
@pytest.mark.parametrize("number", [{}, {"num_draft_tokens": 4}], ids=["auto", "4"])
def test_generate_gives_the_same_text(
    demo: Any, options: dict[str, Any], number: dict[str, Any]
) -> None:
    asks = {"prompt_lookup": True, "max_tokens": 60} | options | number
    text = generate(*demo, CODE_AGAIN, max_tokens=60)
    assert generate(*demo, CODE_AGAIN, **asks) == text
    *_, last = stream_generate(*demo, CODE_AGAIN, **asks)
    accepted = last.speculation.num_accepted_per_source
    assert accepted["prompt_lookup"] > 0
    assert accepted.keys() <= {"prompt_lookup", "mtp"}
    assert sum(accepted.values()) == last.speculation.num_accepted


def test_a_sampled_text_is_the_same_whether_or_not_copies_are_drafted(
    demo: Any,
) -> None:
    sampler = make_sampler(temp=0.7, top_p=0.9)
    texts = set()
    for options in ({"mtp": True}, {"mtp": True, "prompt_lookup": True}):
        mx.random.seed(4)
        texts.add(
            generate(*demo, CODE_AGAIN, max_tokens=60, sampler=sampler, **options)
        )
    assert len(texts) == 1


def test_nothing_is_copied_where_that_is_turned_off(demo: Any) -> None:
    *_, last = stream_generate(*demo, CODE_AGAIN, mtp=True, prompt_lookup=False)
    assert last.speculation.num_drafted_per_source.keys() <= {"mtp"}
    *_, last = stream_generate(*demo, CODE_AGAIN, prompt_lookup=False)
    assert not hasattr(last, "speculation")


def test_what_is_neither_true_nor_false_is_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match="prompt_lookup must be True or False, got 3"):
        generate(*demo, CODE_AGAIN, prompt_lookup=3)


def test_a_draft_model_drafts_beside_copies(demo: Any) -> None:
    model, tokenizer = demo
    expected = generate(model, tokenizer, CODE_AGAIN, max_tokens=60)
    *_, last = stream_generate(
        model,
        tokenizer,
        CODE_AGAIN,
        max_tokens=60,
        draft_model=model,
        prompt_lookup=True,
        num_draft_tokens=3,
    )
    assert last.speculation.num_tokens == 60
    assert set(last.speculation.num_drafted_per_source) & {"draft_model"}
    found = generate(
        model,
        tokenizer,
        CODE_AGAIN,
        max_tokens=60,
        draft_model=model,
        prompt_lookup=True,
    )
    assert found == expected


@pytest.mark.parametrize("options", [{}, {"mtp": True}], ids=["alone", "with a head"])
def test_batch_generate_copies_for_each_sequence(
    demo: Any, options: dict[str, Any]
) -> None:
    model, tokenizer = demo
    prompts = [tokenizer.encode(text) for text in (CODE_AGAIN, "import os\n", CODE)]
    plain = batch_generate(model, tokenizer, prompts, max_tokens=50)
    found = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=50,
        prompt_lookup=True,
        num_draft_tokens=4,
        **options,
    )
    assert found.texts == plain.texts
    accepted = found.speculation[0].num_accepted_per_source
    assert sum(accepted.values()) > 0
    assert options or accepted.keys() == {"prompt_lookup"}


def test_a_batch_generator_copies(demo: Any) -> None:
    model, tokenizer = demo
    generator = SpeculativeBatchGenerator(model, prompt_lookup=True, max_tokens=40)
    (uid,) = generator.insert([tokenizer.encode(CODE_AGAIN)])
    stats = generator.stats_of(uid)
    tokens = []
    while responses := generator.next_generated():
        tokens += [response.token for response in responses]
    expected = stream_generate(model, tokenizer, CODE_AGAIN, max_tokens=40)
    assert tokens == [response.token for response in expected][: len(tokens)]
    assert stats.num_drafted_per_source.keys() == {"prompt_lookup"}


def test_a_later_turn_copies_from_an_earlier_one(demo: Any) -> None:
    model, tokenizer = demo
    tokens = tokenizer.encode(CODE_AGAIN)
    counts = []
    for prompts in ([tokens], [tokens[:40], tokens[40:]]):
        cache = make_prompt_cache(model)
        for prompt in prompts:
            *_, last = stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens=1 if prompt is not prompts[-1] else 30,
                prompt_cache=cache,
                prompt_lookup=True,
                num_draft_tokens=4,
            )
        counts.append(last.speculation.num_accepted)
    assert counts[1] >= counts[0] / 2 > 0


def test_generate_prints_the_same_text_and_what_was_copied() -> None:
    code, plain, _ = run("generate", *FLAGS)
    code_too, found, _ = run("generate", *FLAGS, "--prompt-lookup")
    assert (code, code_too) == (0, 0)
    assert found.split("==========")[1] == plain.split("==========")[1]
    counts = re.search(r"(\d+) of (\d+) draft tokens accepted", found)
    assert counts is not None
    assert int(counts[1]) > 0


def test_chat_copies_and_says_the_same() -> None:
    turns = "Write a function\nAnother one\nq\n"
    arguments = ("--model", DEMO, "-m", 30)
    code, plain, _ = run("chat", *arguments, text=turns)
    code_too, found, _ = run("chat", *arguments, "--prompt-lookup", text=turns)
    assert (code, code_too) == (0, 0)
    assert re.sub(r"[\d.]+", "", plain) == re.sub(r"[\d.]+", "", found)


def test_benchmark_runs_with_copies() -> None:
    arguments = ("--model", DEMO, "-p", 16, "-g", 16, "-n", 1, "--prompt-lookup")
    code, output, _ = run("benchmark", *arguments)
    assert code == 0
    assert "Averages" in output


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", ["--prompt-lookup", "--num-draft-tokens", "9"], "from 1 to 8"),
        ("generate", ["--prompt-lookup", "--draft-vocab", "64"], "needs --mtp"),
        (
            "server",
            ["--prompt-lookup", "--draft", str(DEMO)],
            "not allowed with a draft model",
        ),
        ("cache_prompt", ["--prompt-lookup"], "unrecognized arguments"),
    ],
)
def test_contradictory_flags_are_a_usage_error(
    command: str, arguments: list[str], message: str
) -> None:
    if command == "cache_prompt":
        arguments = [*arguments, "--prompt", "x", "--prompt-cache-file", "y"]
    code, _, error = run(command, *arguments)
    assert code == 2
    assert message in error
