"""The command lines of mlx-lm with the flags for speculation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import DEMO
from tests.processes import run_command as run

PROMPT = ["--prompt", "class Queue:\n", "--ignore-chat-template"]


def text_of(output: str) -> str:
    return output.split("==========\n")[1]


def test_generate_prints_the_same_text_and_one_more_line() -> None:
    arguments = ("--model", DEMO, *PROMPT, "--max-tokens", 60)
    code, plain, _ = run("generate", *arguments)
    flags = ("--mtp", "--num-draft-tokens", 1)
    code_too, speculative, _ = run("generate", *arguments, *flags)
    assert (code, code_too) == (0, 0)
    assert text_of(plain) == text_of(speculative)
    pattern = r"Speculation: (\d+) rounds, .* of (\d+) draft tokens accepted .*%\)\n$"
    counts = re.search(pattern, speculative)
    assert counts is not None
    assert counts[1] == counts[2]
    assert "Speculation" not in plain


def test_by_default_the_depth_is_measured() -> None:
    arguments = ("--model", DEMO, *PROMPT, "--max-tokens", 60)
    _, plain, _ = run("generate", *arguments)
    for flags in ([], ["--num-draft-tokens", "auto"]):
        code, speculative, _ = run("generate", *arguments, "--mtp", *flags)
        assert code == 0
        assert text_of(plain) == text_of(speculative)
        # The first tokens are decoded plainly, for their time.
        calls = re.search(r"calls by depth (\d+), (\d+)", speculative)
        assert calls is not None
        assert int(calls[1]) >= 3
        assert int(calls[2]) >= 1


def test_generate_takes_a_path_and_a_number_of_draft_tokens() -> None:
    code, output, _ = run(
        "generate", "--model", DEMO, *PROMPT, "--mtp", DEMO, "--num-draft-tokens", 3
    )
    assert code == 0
    rounds, drafted = re.search(r"(\d+) rounds.* of (\d+) draft", output).groups()
    assert int(drafted) > 2 * int(rounds)


def test_generate_proposes_some_tokens_only() -> None:
    arguments = ("--model", DEMO, *PROMPT, "--max-tokens", 60, "--mtp")
    arguments += ("--num-draft-tokens", 1)
    outputs = [
        run("generate", *arguments, *more)[1] for more in ((), ("--draft-vocab", 64))
    ]
    assert text_of(outputs[0]) == text_of(outputs[1])
    rates = [float(re.search(r"\((.*)%\)", output)[1]) for output in outputs]
    assert rates[1] < rates[0]


def test_a_file_without_token_ids_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    arguments = ("--model", DEMO, *PROMPT, "--mtp", "--draft-vocab", file)
    code, _, error = run("generate", *arguments)
    assert code == 1
    assert "Traceback" not in error
    assert "is no file of token ids" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", ["--mtp", "--draft-model", "x"], "not allowed with argument"),
        ("generate", ["--mtp", "--num-draft-tokens", "9"], "from 1 to 8, got 9"),
        ("chat", ["--mtp", "--num-draft-tokens", "0"], "from 1 to 8, got 0"),
        ("generate", ["--draft-vocab", "64"], "needs --mtp"),
        ("chat", ["--mtp", "--draft-vocab", "0"], "positive whole number"),
        ("server", ["--draft", str(DEMO), "--draft-vocab", "9"], "needs --mtp"),
    ],
)
def test_contradictory_arguments_are_a_usage_error(
    command: str, arguments: list[str], message: str
) -> None:
    code, _, error = run(command, *arguments)
    assert code == 2
    assert message in error


def test_a_head_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    code, _, error = run("generate", "--model", DEMO, *PROMPT, "--mtp", tmp_path)
    assert code == 1
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: Cannot speculate")
    assert str(tmp_path) in error


def test_chat_speculates_in_every_turn() -> None:
    turns = "Write a function\nAnother one\nq\n"
    code, plain, _ = run("chat", "--model", DEMO, "-m", 30, text=turns)
    code_too, speculative, _ = run(
        "chat", "--model", DEMO, "-m", 30, "--mtp", text=turns
    )
    assert (code, code_too) == (0, 0)
    assert without_figures(plain) == without_figures(speculative)


def without_figures(output: str) -> str:
    return re.sub(r"[\d.]+", "", output)


def test_benchmark_runs_with_the_head() -> None:
    code, output, _ = run(
        "benchmark", "--model", DEMO, "-p", 16, "-g", 16, "-n", 1, "--mtp"
    )
    assert code == 0
    assert "Averages" in output


def test_a_prompt_cache_from_a_file_is_primed(tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    saved, _, _ = run(
        "cache_prompt",
        "--model",
        DEMO,
        "--prompt",
        "Write a function that reads a file",
        "--prompt-cache-file",
        file,
        "--mtp",
    )
    assert saved == 0
    arguments = ("--prompt-cache-file", file, "--prompt", "line by line", "-m", 40)
    code, plain, _ = run("generate", *arguments)
    code_too, speculative, _ = run("generate", *arguments, "--mtp")
    assert (code, code_too) == (0, 0)
    assert text_of(plain) == text_of(speculative)
    assert "Speculation" in speculative
