"""Labs in processes of their own, and a real browser to look at them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import mlx.core as mx
import pytest
from playwright.sync_api import Browser, sync_playwright

from mlx_optiq_ext.lab._supervisor import free_port
from tests.helpers import DEMO

TIMEOUT = 60.0  # A test that waits longer than this has found a bug.
NEVER_WRITTEN = "\u0100"  # A null byte, in the spelling of byte-level BPE.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
START = "from mlx_optiq_ext.cli import main; main()"


class LabProcess:
    """A Lab and what its page knows.

    Args:
        folder (Path): For its cache of the Hub and its log.
        flags (str): Further ones of its command line.
    """

    def __init__(self, folder: Path, *flags: str):
        self.log = folder / "lab.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, "lab", "--port", "0", "--no-browser", *flags],
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=os.environ | {"HF_HOME": str(folder), "PYTHONUNBUFFERED": "1"},
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + self.log.read_text()
        self.url = found[0]
        self.base = self.url.partition("/?")[0]
        self.client = httpx2.Client(base_url=self.base, timeout=TIMEOUT)
        assert self.client.get(self.url, follow_redirects=True).status_code == 200

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.client.post(f"/api/{path}", json=body)

    def events(self) -> Iterator[tuple[str, Any]]:
        """What a page that connects now is told."""
        name = ""
        with self.client.stream("GET", "/api/events") as reply:
            for line in reply.iter_lines():
                kind, _, text = line.partition(": ")
                if kind == "event":
                    name = text
                elif kind == "data":
                    yield name, json.loads(text)

    def wait_for(
        self, name: str, is_wanted: Callable[[Any], bool] = lambda data: True
    ) -> Any:
        """The first event of a name that is as wanted."""
        deadline = time.monotonic() + TIMEOUT
        for found, data in self.events():
            if found == name and is_wanted(data):
                return data
            assert time.monotonic() < deadline, data
        raise AssertionError(f"the Lab ended: {self.log.read_text()}")

    def wait_until(self, status: str) -> dict[str, Any]:
        state: dict[str, Any] = self.wait_for("state", lambda s: s["status"] == status)
        return state

    def start(self, **settings: Any) -> dict[str, Any]:
        """Start a server and wait until it is ready."""
        settings = {"model": "demo/qwen", "mtp": True, "port": free_port()} | settings
        reply = self.post("start", settings)
        assert reply.status_code == 200, reply.text
        return self.wait_until("ready")

    def close(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait(TIMEOUT)


StartLab = Callable[..., LabProcess]


@pytest.fixture(scope="module")
def start_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartLab]:
    labs: list[LabProcess] = []

    def start(*flags: str) -> LabProcess:
        labs.append(LabProcess(tmp_path_factory.mktemp("lab"), *flags))
        return labs[-1]

    yield start
    for lab in labs:
        lab.close()


@pytest.fixture(scope="module")
def lab(start_lab: StartLab, headless: Path, endless: Path) -> LabProcess:
    """The Lab that the tests of a module share."""
    return start_lab("--models", str(headless.parent))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def endless(models: Path) -> Path:
    """The demo model, for which only a token that is never written ends a reply."""
    folder = models / "endless"
    shutil.copytree(DEMO, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for name, key, end in (
        ("config.json", "eos_token_id", tokens[NEVER_WRITTEN]),
        ("generation_config.json", "eos_token_id", tokens[NEVER_WRITTEN]),
        ("tokenizer_config.json", "eos_token", NEVER_WRITTEN),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: end}))
    return folder


@pytest.fixture(scope="session")
def headless(models: Path) -> Path:
    """The demo model, without its head."""
    folder = models / "headless"
    shutil.copytree(DEMO, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    trunk = {k: v for k, v in weights.items() if not k.startswith("mtp.")}
    mx.save_safetensors(str(folder / "model.safetensors"), trunk)
    return folder


# Not for the whole session: as long as it runs, an event loop does.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def also(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the servers that this process starts do something first."""

    def add(code: str) -> None:
        guard = "import sys\nif 'mlx_lm.server' in sys.orig_argv:\n"
        (tmp_path / "sitecustomize.py").write_text(
            guard + textwrap.indent(code, "    ")
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return add


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether something becomes so before a bug is certain."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
