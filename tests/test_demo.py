"""`mlx-optiq-ext demo`, as the command that a newcomer runs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click import unstyle

from mlx_optiq_ext.cli.demo import GEMMA, MODEL, PROMPT
from tests import processes

START = "from mlx_optiq_ext.cli import main; main()"
COMMAND = (sys.executable, "-c", START, "demo")
REPORT = (
    "Plain",
    "Speculative",
    "Speed-up",
    "Draft tokens accepted",
    "Mean accepted length",
    "Outputs identical",
)
GREEN = "\x1b[32m"


def run(*arguments: str) -> str:
    result = processes.run(START, "mlx-optiq-ext", "demo", *arguments)
    assert (result.code, result.error) == (0, "")
    return result.output


def run_in_terminal(*arguments: str, **environment: str) -> str:
    """Run it where the standard output is a terminal, and return what that shows."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=theirs, cwd="/", env=os.environ | environment
    ):
        os.close(theirs)
        shown = b""
        # The read fails once the other end is closed.
        while part := _read(ours):
            shown += part
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def report_of(lines: list[str]) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in lines if ": " in line)
    return {name: value.strip() for name, value in pairs if name in REPORT}


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_demo_shows_both_texts_and_what_differs(family: str) -> None:
    lines = run("--family", family, "--tokens", "24").splitlines()
    plain, speculative = lines.index("Plain"), lines.index("Speculative")
    length = speculative - plain
    text = lines[plain + 1 : speculative]
    assert lines[0] == PROMPT
    assert text[0].startswith("def ")
    assert text == lines[speculative + 1 : speculative + length]
    report = report_of(lines[speculative + length :])
    assert tuple(report) == REPORT
    assert report["Outputs identical"] == "yes"
    assert report["Plain"].endswith("tokens-per-sec")
    assert float(report["Speed-up"]) > 0
    assert report["Draft tokens accepted"].endswith("%")
    assert 1 < float(report["Mean accepted length"].split()[0]) <= 3


def test_demo_answers_what_a_visitor_asks_in_as_many_tokens_as_told() -> None:
    prompt = "Write a function that loads a JSON file."
    short = run("--prompt", prompt, "--tokens", "3").splitlines()
    longer = run("--prompt", prompt, "--tokens", "12").splitlines()
    assert short[0] == longer[0] == prompt
    assert longer[3].startswith(short[3])
    assert longer[3:] != short[3:]


def test_accepted_drafts_have_a_colour_where_the_terminal_has_colours() -> None:
    shown = run_in_terminal("--tokens", "24", TERM="xterm")
    plain, speculative = shown.split("Speculative", 1)
    assert GREEN not in plain
    assert speculative.count(GREEN) > 2
    assert PROMPT in plain
    text = unstyle(plain).split("Plain\n")[1].strip()
    assert unstyle(speculative).split("\n", 1)[1].startswith(text)


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_there_is_no_colour_where_none_is_wanted(variable: dict[str, str]) -> None:
    assert "\x1b" not in run_in_terminal("--tokens", "2", **variable)


def test_demo_says_where_the_model_is() -> None:
    assert run("--path") == f"{MODEL}\n"
    gemma = run("--family", "gemma", "--path").strip()
    assert gemma == str(GEMMA)
    assert (Path(gemma) / "assistant" / "config.json").is_file()
