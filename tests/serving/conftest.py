"""Real servers in processes of their own."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.processes import ForkedProcess

from .scripted import make_model

START = "import mlx_optiq_ext; from mlx_lm.server import main; main()"

# A test that waits longer than this has found a bug.
TIMEOUT = 30.0


class ServerProcess:
    """A server and what is needed to talk to it."""

    def __init__(self, folder: Path, log: Path, *flags: str, start: str = START):
        self.folder = folder
        self.log = log
        self.port = free_port()
        arguments = ["--model", str(folder), "--port", str(self.port), *flags]
        self.process = ForkedProcess(
            start, "mlx_lm.server", "--trust-remote-code", *arguments, output=log
        )
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text()

    def anthropic(self, **options: str) -> anthropic.Anthropic:
        defaults: dict[str, Any] = {"api_key": "none", "base_url": self.url}
        return anthropic.Anthropic(**defaults | options, timeout=TIMEOUT, max_retries=0)

    def openai(self, **options: str) -> openai.OpenAI:
        defaults: dict[str, Any] = {"api_key": "none", "base_url": f"{self.url}/v1"}
        return openai.OpenAI(**defaults | options, timeout=TIMEOUT, max_retries=0)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=TIMEOUT)
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"the server did not start: {self.output()}")


Starter = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def scripted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="session")
def strict_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("strict"), is_strict=True)


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory, scripted_folder: Path
) -> Iterator[Starter]:
    servers: list[ServerProcess] = []

    def run(
        *flags: str, folder: Path = scripted_folder, start: str = START
    ) -> ServerProcess:
        log = tmp_path_factory.mktemp("server") / "server.log"
        servers.append(ServerProcess(folder, log, *flags, start=start))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Starter) -> ServerProcess:
    """The server that most tests share."""
    return start_server()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
