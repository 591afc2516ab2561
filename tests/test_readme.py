"""What the README shows works as it is shown."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from mlx_optiq_ext.drafters import REGISTRY
from tests.helpers import DEMO

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GEMMA = DEMO.parent / "demo_gemma"

# These stand for the models of the README, none of which can be had offline.
WITH_HEAD, WITHOUT_HEAD = "Qwen/Qwen3.5-9B", "mlx-community/Qwen3.5-9B-MLX-4bit"
GEMMA_ID = "mlx-community/gemma-4-e4b-it-4bit"
ASSISTANT_ID = "mlx-community/gemma-4-e4b-it-assistant-bf16"
PORT = "8080"

PROGRAMS = ("mlx_lm.", "mlx-optiq-ext ", "curl ")


def block_with(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    return block


def commands() -> list[str]:
    """Every command in a block or in a cell of a table, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").split("\n")]
    cells = re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    )
    found = {" ".join(c.split()) for c in [*lines, *cells] if c.startswith(PROGRAMS)}
    # The beginning of another command only names the program.
    return sorted(c for c in found if not any(o.startswith(f"{c} ") for o in found))


class Reader:
    """Somebody who types the commands of the README.

    Args:
        place (Path): A folder for the models that stand for those of the README.
    """

    def __init__(self, place: Path):
        self._place = place
        self._headless = place / "headless"
        mlx_lm.convert(str(DEMO), str(self._headless), mtp=False)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def substitute(self, command: str, folder: Path) -> str:
        stand_ins = {
            WITHOUT_HEAD: self._headless,
            WITH_HEAD: DEMO,
            GEMMA_ID: GEMMA,
            ASSISTANT_ID: GEMMA / "assistant",
            # A folder has the names of the others in its own.
            "FILE": self._schema(),
            "FOLDER": folder,
            "MODEL": DEMO,
            PORT: self.port,
        }
        for name, stand_in in stand_ins.items():
            command = re.sub(rf"\b{re.escape(name)}\b", str(stand_in), command)
        return command

    def _schema(self) -> Path:
        path = self._place / "schema.json"
        path.write_text('{"enum": ["big", "small"]}')
        return path

    def run(self, command: str, typed: str = "") -> str:
        """What a command prints; its folder is a conversion, or a new one."""
        name = re.sub(r"\W+", "-", command)
        folder = self._place / name
        if "--mlx-path" not in command:
            is_to_get_head = "extract-mtp" in command
            shutil.copytree(self._headless if is_to_get_head else DEMO, folder)
        result = subprocess.run(
            ["bash", "-c", self.substitute(command, folder)],
            input=typed,
            env=environment(),
            capture_output=True,
            text=True,
        )
        # Whether a model works is also the exit code of `doctor`.
        lacks_head = command == f"mlx-optiq-ext doctor {WITHOUT_HEAD}"
        assert result.returncode == lacks_head, result.stdout + result.stderr
        return result.stdout


def environment() -> dict[str, str]:
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("readme"))


# The tests of the Lab start that.
IS_SERVER = re.compile(r"mlx_lm\.server|curl |mlx-optiq-ext lab")


@pytest.mark.parametrize("command", [c for c in commands() if not IS_SERVER.match(c)])
def test_a_command_of_the_readme_does_its_work(command: str, reader: Reader) -> None:
    output = reader.run(command, typed="Hello\nq\n")
    if command.startswith(("mlx_lm.generate", "mlx-optiq-ext")):
        assert output.strip()


@pytest.fixture(scope="module")
def served(reader: Reader) -> Iterator[Reader]:
    (command,) = (c for c in commands() if c.startswith("mlx_lm.server") and PORT in c)
    process = subprocess.Popen(
        shlex.split(reader.substitute(command, DEMO)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{reader.port}/health")
                break
            except OSError:
                continue
        assert process.poll() is None
        yield reader
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("curl ")])
def test_a_request_of_the_readme_is_answered(command: str, served: Reader) -> None:
    answer = json.loads(served.run(command))
    assert answer["choices"][0]["message"]["content"]


def test_the_two_commands_for_newcomers_are_those_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"```bash\n(python -m venv .*?)\n```", README)
    for command in blocks:
        steps = [step.strip() for step in command.split("&&")][2:]
        assert all(step in ci for step in steps), steps
    assert len(blocks) == 2


def test_a_drafter_is_added_with_a_class_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"mx": mx}
    exec(block_with("class RepeatDrafter"), names)
    monkeypatch.setitem(REGISTRY, "repeat", names["RepeatDrafter"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "repeat"}))
    model, tokenizer = mlx_lm.load(str(DEMO))
    plain = mlx_lm.generate(model, tokenizer, "class Queue:\n", max_tokens=40)
    *_, last = mlx_lm.stream_generate(
        model,
        tokenizer,
        "class Queue:\n",
        max_tokens=40,
        draft=str(tmp_path),
        num_draft_tokens=1,
    )
    assert last.speculation.num_drafted > 30
    assert plain == mlx_lm.generate(
        model, tokenizer, "class Queue:\n", max_tokens=40, draft=tmp_path
    )


def test_statistics_are_on_the_last_response(capsys: Any) -> None:
    code = block_with("response.speculation")
    for name in (WITHOUT_HEAD, WITH_HEAD):
        code = code.replace(name, str(DEMO))
    exec(code, {})
    rates = capsys.readouterr().out.split()[-2:]
    assert 0 <= float(rates[0]) <= 1 <= float(rates[1])


def test_the_published_snippet_runs(capsys: Any) -> None:
    names = {"path": GEMMA, "assistant_path": GEMMA / "assistant"}
    exec(block_with("spec_generate"), names)
    assert len(capsys.readouterr().out) > 100


def test_every_script_is_listed() -> None:
    text = (ROOT / "scripts" / "README.md").read_text()
    scripts = {file.name for file in (ROOT / "scripts").glob("[a-z]*.py")}
    assert {name for name in scripts - {"startup.py"} if f"`{name}`" in text} == (
        scripts - {"startup.py"}
    )


def test_places_in_the_code_that_the_readme_names_exist() -> None:
    package = ROOT / "mlx_optiq_ext"
    places = re.findall(r"`((?:mlx_optiq_ext/)?[a-z_]+/[a-z_0-9]*(?:\.py)?)`", README)
    assert places
    for place in places:
        assert (package / place.removeprefix("mlx_optiq_ext/")).exists(), place


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert len(README.split()) < 1800
