"""A server in a process of its own, as the scripts that wear it out need it."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_optiq_ext.cli.demo import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
START = "import mlx_optiq_ext; from mlx_lm.server import main; main()"
HOST = "127.0.0.1"

# What may come on top of what a server that is warm uses.
MEMORY_ALLOWANCE = 64 << 20
THREAD_ALLOWANCE = 2
START_TIMEOUT = 300.0
SETTLE_TIMEOUT = 90.0


ACCEPTED = re.compile(r"^spec_decode_num_accepted_tokens_total (\S+)", re.MULTILINE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="qwen")
    parser.add_argument("--plain", action="store_true", help="serve it plainly")


def speculation_flags(family: str) -> tuple[str, ...]:
    """With which the demo model of a family is served speculatively."""
    ((name, value),) = FAMILIES[family][1].items()
    return (f"--{name}",) if value is True else (f"--{name}", str(value))


class Served:
    """A server of a demo model on a free port of the loopback interface.

    Args:
        family (str): Of the model.
        flags (str): Further flags of the server.
        off (bool): Whether to switch this project off.
    """

    def __init__(self, family: str, *flags: str, off: bool = False):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory()
        self.log = Path(self._folder.name) / "server.log"
        model, port = str(FAMILIES[family][0]), str(self.port)
        arguments = ["--model", model, "--port", port, *flags]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments, "--log-level", "WARNING"],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": self._folder.name,
                "MLX_OPTIQ_EXT": "0" if off else "1",
            },
        )

    def __enter__(self) -> Served:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.is_healthy():
                return self
            time.sleep(0.1)
        self._stop()
        raise SystemExit("the server did not start")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def is_healthy(self) -> bool:
        try:
            return self.ask("GET", "/health", timeout=5.0)[0] == 200
        except OSError:
            return False

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float = 60.0
    ) -> tuple[int, Any]:
        """Status and JSON body of the reply to a request."""
        connection = self.connect(timeout)
        try:
            connection.request(method, path, body and json.dumps(body))
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def metrics(self) -> str:
        connection = self.connect()
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=timeout)

    def num_bytes(self) -> int:
        """Resident memory of the server."""
        command = ["ps", "-o", "rss=", "-p", str(self._process.pid)]
        return int(subprocess.check_output(command)) << 10

    def num_threads(self) -> int:
        """Threads of the server, where the system tells."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.exists() else 0

    def tracebacks(self) -> list[str]:
        """The tracebacks in the log, each once."""
        _, *parts = self.log.read_text(errors="replace").split("Traceback (most recent")
        return sorted({_without_rest(part.splitlines()) for part in parts})

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _without_rest(lines: list[str]) -> str:
    """The lines of a log up to the exception that ends a traceback."""
    ends = (i for i, line in enumerate(lines) if i and not line.startswith(" "))
    return "\n".join(lines[: next(ends, len(lines)) + 1])


def check_speculation(served: Served) -> list[str]:
    """See that a server has speculated."""
    (count,) = ACCEPTED.findall(served.metrics())
    print(f"{float(count):.0f} draft tokens accepted")
    return [] if float(count) else ["no draft token was ever accepted"]


class Baseline:
    """Memory and threads of a server that is warm, to compare with later."""

    def __init__(self, served: Served):
        self._served = served
        self._num_bytes = served.num_bytes()
        self._num_threads = served.num_threads()

    def problems(self) -> list[str]:
        """What did not go back to where it was."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while (found := self._problems()) and time.monotonic() < deadline:
            time.sleep(1.0)
        return found

    def _problems(self) -> list[str]:
        num_bytes, num_threads = self._served.num_bytes(), self._served.num_threads()
        print(
            f"memory {self._num_bytes >> 20} -> {num_bytes >> 20} MiB, "
            f"threads {self._num_threads} -> {num_threads}"
        )
        problems = []
        if num_bytes > self._num_bytes + MEMORY_ALLOWANCE:
            problems.append("the server uses more memory than before")
        if num_threads > self._num_threads + THREAD_ALLOWANCE:
            problems.append("the server has more threads than before")
        if not self._served.is_healthy():
            problems.append("the server is not healthy")
        return problems


def finish(problems: list[str]) -> None:
    """End the script, with an error if there are problems."""
    for problem in problems:
        print(f"PROBLEM: {problem}")
    raise SystemExit(1 if problems else print("all is well"))
