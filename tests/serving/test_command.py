"""The server as a program: one line and a status when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import DEMO
from tests.processes import Result, run_command

from .conftest import TIMEOUT, ServerProcess, Starter, free_port
from .scripted import say
from .test_faults import send
from .test_http import MESSAGE, ask

KEY = "MLX_OPTIQ_EXT_API_KEY"


def run(*flags: str) -> Result:
    return run_command("server", *flags)


def error_line(text: str) -> str:
    """The one line that says what went wrong, among those of the log."""
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.mark.parametrize("flags", [(), ("--mtp",)])
def test_a_port_in_use(taken_port: int, flags: tuple[str, ...]) -> None:
    result = run("--model", str(DEMO), "--port", str(taken_port), *flags)
    assert result.code == 1
    assert "Traceback" not in result.error
    line = error_line(result.error)
    assert line.startswith("error: cannot listen at 127.0.0.1")
    assert str(taken_port) in line
    assert "in use" in line


def test_a_host_that_there_is_none_of() -> None:
    result = run("--model", str(DEMO), "--host", "no.such.host.invalid")
    assert result.code == 1
    assert "Traceback" not in result.error
    assert error_line(result.error).startswith("error: cannot listen at")


@pytest.mark.parametrize("flags", [(), ("--mtp",)])
@pytest.mark.parametrize("kind", ["missing", "empty", "unknown", "hub"])
def test_a_model_that_cannot_be_loaded(
    tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    folder = tmp_path / kind
    model = "nobody/has-this-model" if kind == "hub" else str(folder)
    if kind not in ("missing", "hub"):
        folder.mkdir()
    if kind == "unknown":
        (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    result = run("--model", model, "--port", str(free_port()), *flags)
    assert result.code == 1
    assert "Traceback" not in result.error
    assert error_line(result.error)


def wait_for_end(server: ServerProcess) -> int:
    return server.process.wait(TIMEOUT)


@pytest.mark.parametrize("seed", [None, 1])
def test_an_interrupt_ends_a_generation_and_the_server(
    start_server: Starter, seed: int | None
) -> None:
    server = start_server()
    # It would take longer than the test waits.
    text = say("a" * 500, sleep=0.2)
    body = MESSAGE | {"messages": [{"role": "user", "content": text}], "stream": True}
    body |= {"max_tokens": 1000} | ({} if seed is None else {"seed": seed})
    data = json.dumps(body)
    with server.connect() as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall((head + data).encode())
        while b"text_delta" not in connection.recv(1 << 16):
            pass
        os.kill(server.pid, signal.SIGINT)
        assert wait_for_end(server) == 130
    assert server.output().splitlines()[-1] == "Stopped."
    assert "Traceback" not in server.output()


def test_an_interrupt_during_a_prompt(start_server: Starter) -> None:
    server = start_server()
    text = say("a", prefill_sleep=4 * TIMEOUT)
    with send(server, "/v1/messages", text, stream=True):
        time.sleep(1.0)
        os.kill(server.pid, signal.SIGINT)
        os.kill(server.pid, signal.SIGINT)
        assert wait_for_end(server) == 130
    assert server.output().splitlines()[-1] == "Stopped."
    assert "Traceback" not in server.output()


def test_a_key_from_the_environment(
    start_server: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "of the environment")
    server = start_server()
    assert ask(server, "POST", "/v1/messages", MESSAGE)[0] == 401
    key = {"x_api_key": "of the environment"}
    assert ask(server, "POST", "/v1/messages", MESSAGE, **key)[0] == 200
    flag = start_server("--api-key", "of the flag")
    assert ask(flag, "POST", "/v1/messages", MESSAGE, **key)[0] == 401
    # A variable that was meant to hold a key must not leave the server open.
    monkeypatch.setenv(KEY, "")
    assert run("--model", str(DEMO)).code == 2


def test_the_help_names_the_variable_and_the_statuses() -> None:
    text = " ".join(run("--help").output.split())
    assert KEY in text
    assert "130 after Ctrl-C" in text
