"""`mlx-optiq-ext demo`, as the command that a newcomer runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import DEMO


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from mlx_optiq_ext.cli import main; main()",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    )


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_demo_shows_both_texts_and_what_differs(family: str) -> None:
    options = ("--family", family, "--max-tokens", "60", "--num-draft-tokens", "2")
    lines = run("demo", *options).stdout.splitlines()
    plain, speculative = lines.index("Plain"), lines.index("Speculative")
    report = dict(line.split(":", 1) for line in lines[-6:])
    length = speculative - plain
    assert (
        lines[plain + 1 : speculative] == lines[speculative + 1 : speculative + length]
    )
    assert report["Outputs identical"].strip() == "yes"
    assert report["Plain"].endswith("tokens-per-sec")
    assert float(report["Speed-up"]) > 0
    assert report["Draft tokens accepted"].endswith("%")
    assert 1 < float(report["Mean accepted length"].split()[0]) <= 3


def test_demo_says_where_the_model_is() -> None:
    assert run("demo", "--path").stdout == f"{DEMO}\n"
    gemma = run("demo", "--family", "gemma", "--path").stdout.strip()
    assert (Path(gemma) / "assistant" / "config.json").is_file()


def test_demo_does_not_warn_about_its_own_size() -> None:
    assert run("demo", "--max-tokens", "4").stderr == ""
