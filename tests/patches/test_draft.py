"""``draft=``, ``--draft`` and what ``--draft-model`` recognises."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import GemmaAssistantDrafter, SpeculationError
from mlx_optiq_ext._record import record_of
from tests.gemma import (
    A4B,
    E4B,
    add_tokenizer,
    assistant_folder,
    copy,
    load_target,
    target_folder,
)
from tests.helpers import DEMO, assert_same_cache
from tests.patches.test_command_line import text_of
from tests.patches.test_generate import comparable

PROMPT = "w5 w9 w3 w44"
ASSISTANT = assistant_folder(E4B)


def wide(config: dict[str, Any]) -> None:
    """Below the window, speculation is exact."""
    config["sliding_window"] = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "target"
    return add_tokenizer(copy(target_folder(E4B), path, wide))


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Any:
    return mlx_lm.load(str(folder))


@pytest.mark.parametrize(
    "draft",
    [
        str(ASSISTANT),
        ASSISTANT,
        GemmaAssistantDrafter.from_pretrained(ASSISTANT),
        load_target(A4B),
    ],
    ids=["string", "path", "drafter", "model"],
)
@pytest.mark.parametrize("num_draft_tokens", [None, 3])
def test_responses_are_those_of_plain_decoding(gemma, draft, num_draft_tokens):
    plain = list(stream_generate(*gemma, PROMPT, max_tokens=20))
    options = {"draft": draft, "num_draft_tokens": num_draft_tokens}
    # Whoever knows what rounds took may draft nothing; whoever does not tries it.
    record_of(gemma[0]).round_times.clear()
    speculative = list(stream_generate(*gemma, PROMPT, max_tokens=20, **options))
    assert comparable(plain) == comparable(speculative)
    for one, other in zip(plain, speculative, strict=True):
        assert mx.array_equal(one.logprobs, other.logprobs)
    stats = speculative[-1].speculation
    assert stats.num_tokens == 20
    assert stats.num_rounds > 0
    if num_draft_tokens is not None:
        drafted_first = stats.num_drafted_per_position[0]
        assert len(stats.num_drafted_per_position) == num_draft_tokens
        assert drafted_first >= stats.num_rounds > 10


def test_generate_prints_the_same_text_and_one_more_line(gemma, capsys):
    options = {"max_tokens": 20, "verbose": True}
    plain = generate(*gemma, PROMPT, **options)
    printed = capsys.readouterr().out.splitlines()
    assert generate(*gemma, PROMPT, draft=ASSISTANT, **options) == plain
    printed_too = capsys.readouterr().out.splitlines()
    assert len(printed_too) == len(printed) + 1
    assert printed_too[-1].startswith("Speculation: ")


def test_no_draft_is_plain_decoding(gemma):
    plain = list(stream_generate(*gemma, PROMPT, max_tokens=5))
    undrafted = list(stream_generate(*gemma, PROMPT, max_tokens=5, draft=None))
    assert comparable(plain) == comparable(undrafted)
    assert not hasattr(undrafted[-1], "speculation")


def test_turns_of_a_chat_share_a_cache_and_a_drafter(gemma):
    caches = [make_prompt_cache(gemma[0]) for _ in range(2)]
    loaded = []
    for turn in (PROMPT, "w7 w8", "w100"):
        texts = [
            generate(*gemma, turn, max_tokens=8, prompt_cache=cache, **options)
            for cache, options in zip(
                caches, ({}, {"draft": str(ASSISTANT)}), strict=True
            )
        ]
        assert texts[0] == texts[1]
        assert_same_cache(*caches)
        loaded.append(record_of(gemma[0]).drafter)
    assert loaded[0] is loaded[1] is loaded[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": 3}, "draft must be a drafter, a model or a path, got 3"),
        ({"draft": ""}, "draft must be a drafter, a model or a path, got ''"),
        ({"draft": True}, "got True"),
        ({"draft": ["x"]}, r"got \['x'\]"),
        ({"draft": ASSISTANT, "mtp": True}, "mtp and draft exclude each other"),
        ({"draft": ASSISTANT, "mtp": "x"}, "mtp and draft exclude each other"),
        (
            {"draft": "x", "draft_model": load_target(A4B)},
            "draft and draft_model exclu",
        ),
        ({"draft": ASSISTANT, "num_draft_tokens": 0}, "from 1 to 8, got 0"),
        ({"draft": ASSISTANT, "num_draft_tokens": "3"}, "from 1 to 8, got '3'"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream_generate])
def test_a_malformed_request_is_a_value_error(gemma, function, options, message):
    with pytest.raises(ValueError, match=message):
        list(function(*gemma, PROMPT, **options))


def test_a_request_that_cannot_be_served_says_why(gemma):
    for draft, message in (
        ("no/such/folder", "no/such/folder is no folder here"),
        (assistant_folder(A4B).with_name("gemma"), "gemma is no folder here"),
    ):
        with pytest.raises(SpeculationError, match=message):
            generate(*gemma, PROMPT, draft=draft)
    demo = mlx_lm.load(str(DEMO))
    with pytest.raises(SpeculationError, match="of type qwen3_5, and only gemma4"):
        generate(*demo, "def", draft=ASSISTANT)
    with pytest.raises(SpeculationError, match="of type gemma4_text, and only qwen3_5"):
        generate(*gemma, PROMPT, mtp=True)


# The command lines.


def run(command: str, *arguments: object, text: str = "") -> tuple[int, str, str]:
    """Exit code and both outputs of ``mlx_lm.<command>``."""
    main = importlib.import_module(f"mlx_lm.{command}").main
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", [command, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(text))
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
            errors.write(str(exit_.code))
    return code, output.getvalue(), errors.getvalue()


def rounds_and_drafted(output: str) -> tuple[int, int]:
    rounds, drafted = re.search(
        r"(\d+) rounds.* of (\d+) draft tokens", output
    ).groups()
    return int(rounds), int(drafted)


@pytest.fixture(scope="module")
def plain_output(folder: Path) -> str:
    code, output, _ = run("generate", *arguments_of(folder))
    assert code == 0
    assert "Speculation" not in output
    return output


def arguments_of(folder: Path) -> list[Any]:
    return ["--model", folder, "--prompt", PROMPT, "--max-tokens", 20]


@pytest.mark.parametrize(
    ("flag", "number"),
    [("--draft", None), ("--draft-model", None), ("--draft-model", 3)],
)
def test_generate_takes_an_assistant(folder, plain_output, flag, number):
    more = [] if number is None else ["--num-draft-tokens", number]
    code, output, errors = run(
        "generate", *arguments_of(folder), flag, ASSISTANT, *more
    )
    assert code == 0, errors
    assert text_of(output) == text_of(plain_output)
    rounds, drafted = rounds_and_drafted(output)
    # The default is not upstream's, which is 3 for draft models.
    assert (drafted > 2 * rounds) == (number == 3)


@pytest.mark.parametrize("flag", ["--draft", "--draft-model"])
def test_generate_takes_a_head_that_is_stored_by_itself(flag, tmp_path):
    file = str(DEMO / "model.safetensors")
    weights, metadata = mx.load(file, return_metadata=True)
    head = {name: x for name, x in weights.items() if name.startswith("mtp.")}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), head, metadata)
    config = json.loads((DEMO / "config.json").read_text())
    config["model_type"] = "qwen3_5_mtp"
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--prompt", "Write a function that reads a file", "-m", 30)
    number = ("--num-draft-tokens", 1)
    code, output, errors = run(
        "generate", "--model", DEMO, *options, flag, tmp_path, *number
    )
    assert code == 0, errors
    accepted = re.search(r"(\d+) of \d+ draft tokens accepted", output)
    assert int(accepted[1]) > 3


def test_an_ordinary_draft_model_stays_one(folder, plain_output):
    code, output, errors = run(
        "generate", *arguments_of(folder), "--draft-model", folder
    )
    assert code == 0, errors
    assert text_of(output) == text_of(plain_output)
    rounds, drafted = rounds_and_drafted(output)
    assert drafted > 2 * rounds  # Upstream drafts three.


def test_draft_takes_an_ordinary_model(folder, plain_output):
    flags = ("--draft", folder, "--num-draft-tokens", 1)
    code, output, errors = run("generate", *arguments_of(folder), *flags)
    assert code == 0, errors
    assert text_of(output) == text_of(plain_output)
    rounds, drafted = rounds_and_drafted(output)
    assert drafted == rounds


def test_benchmark_drafts(folder):
    options = ["--prompt-tokens", 8, "--generation-tokens", 12, "--num-trials", 1]
    code, output, errors = run(
        "benchmark", "--model", folder, *options, "--draft", ASSISTANT
    )
    assert code == 0, errors
    assert "generation_tps" in output


def test_chat_drafts_in_every_turn(folder):
    arguments = ("chat", "--model", folder, "-m", 8)
    code, plain, errors = run(*arguments, text="w5 w9\nw3\nq\n")
    assert code == 0, errors
    code, drafted, errors = run(*arguments, "--draft", ASSISTANT, text="w5 w9\nw3\nq\n")
    assert code == 0, errors
    assert without_speeds(plain) == without_speeds(drafted)


def without_speeds(output: str) -> str:
    return re.sub(r"[\d.]+ (tok/s|GB)", "", output)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (
            "generate",
            ["--mtp", "--draft", "x"],
            "--mtp: not allowed with argument --dra",
        ),
        (
            "generate",
            ["--mtp", "--draft-model", "x"],
            "not allowed with argument --draf",
        ),
        (
            "generate",
            ["--draft", "x", "--draft-model", "x"],
            "--draft: not allowed with",
        ),
        ("generate", ["--draft", "x", "--num-draft-tokens", "9"], "from 1 to 8, got 9"),
        ("chat", ["--mtp", "--draft", "x"], "argument --mtp: not allowed with"),
        ("benchmark", ["--draft", "x", "-b", "2"], "--draft: needs --batch-size 1"),
        ("cache_prompt", ["--draft", "x"], "unrecognized arguments: --draft x"),
    ],
)
def test_flags_that_do_not_go_together_are_a_usage_error(command, flags, message):
    required = ["--prompt-cache-file", "x", "--prompt", "x"]
    more = required if command == "cache_prompt" else []
    code, _, errors = run(command, *flags, *more)
    assert code == 2
    assert message in errors


def test_a_drafter_for_another_model_is_one_line(folder):
    code, _, errors = run("generate", *arguments_of(folder), "--draft", "no/such/where")
    assert code == 1
    assert errors.splitlines()[-1].startswith(
        "error: Cannot speculate: no/such/where is no f"
    )
