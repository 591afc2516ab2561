"""Clients that leave, requests that fail, and a generation thread that dies."""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ServerProcess, Starter
from .scripted import say

# What is not stopped takes longer than any client waits.
SLOW = say("a" * 100, sleep=0.5)
SLOW_PROMPT = say("a", prefill_sleep=30.0)
PATHS = (
    "/v1/messages",
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/completions",
)


def body_for(path: str, text: str, *, stream: bool) -> dict[str, Any]:
    if path == "/v1/responses":
        return {"model": "gpt-x", "input": text, "stream": stream}
    if path == "/v1/completions":
        asked: dict[str, Any] = {"prompt": text}
    else:
        asked = {"messages": [{"role": "user", "content": text}]}
    return {"model": "gpt-x", "max_tokens": 200, "stream": stream, **asked}


def start(
    server: ServerProcess, path: str, text: str, *, stream: bool
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, json.dumps(body_for(path, text, stream=stream)))
    return connection


def reply(server: ServerProcess, text: str) -> tuple[int, Any]:
    response = start(server, "/v1/messages", text, stream=False).getresponse()
    return response.status, json.loads(response.read())


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def single(start_server: Starter) -> ServerProcess:
    """A server with one slot: what does not give it back stops all others."""
    return start_server("--decode-concurrency", "1", "--prompt-concurrency", "1")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_frees_its_slot(
    single: ServerProcess, path: str, stream: bool
) -> None:
    written = len(single.output())
    connection = start(single, path, SLOW, stream=stream)
    if stream:
        assert connection.getresponse().read(10)
    else:
        time.sleep(0.3)
    connection.close()
    assert reply(single, say("next"))[0] == 200
    # Other tests make this server fail.
    assert "Traceback" not in single.output()[written:]


def send(server: ServerProcess, path: str, text: str, *, stream: bool) -> socket.socket:
    """A connection over which a request was sent."""
    body = json.dumps(body_for(path, text, stream=stream))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = server.connect()
    connection.sendall((head + body).encode())
    return connection


def without_ids(reply: bytes) -> list[str]:
    """The lines of a reply that are the same for every client."""
    varying = ("request-id", "x-request-id", "Date", "Content-Length")
    lines = [
        line
        for line in reply.decode().splitlines()
        if not line.startswith(varying) and not line.startswith(":")
    ]
    return [PATTERN_OF_IDS.sub("", line) for line in lines if line]


PATTERN_OF_IDS = re.compile(
    r'(msg|resp|rs|req|chatcmpl|cmpl)[_-][0-9a-f-]+|"(created|completed)\w*": [\d.]+'
    r'|"\w*cache\w*": \d+|"input_tokens": \d+'
)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_shuts_down_its_side_gets_the_whole_reply(
    server: ServerProcess, path: str, stream: bool
) -> None:
    # Long enough for the server to wonder whether the client has left.
    text = say("a" * 4, sleep=0.3, prefill_sleep=1.0)
    replies = []
    for shuts_down in (True, False):
        with send(server, path, text, stream=stream) as connection:
            if shuts_down:
                connection.shutdown(socket.SHUT_WR)
            pieces = iter(functools.partial(connection.recv, 1 << 16), b"")
            replies.append(b"".join(pieces))
    assert replies[0].startswith(b"HTTP/1.0 200 OK\r\n")
    assert without_ids(replies[0]) == without_ids(replies[1])
    for whole in replies:
        head, _, body = whole.decode().partition("\r\n\r\n")
        # How many digits the number of cached tokens has depends on earlier requests.
        assert stream or f"Content-Length: {len(body)}" in head.split("\r\n")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_shuts_down_its_side_and_leaves_frees_its_slot(
    single: ServerProcess, path: str, stream: bool
) -> None:
    connection = send(single, path, SLOW, stream=stream)
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.7)
    connection.close()
    assert reply(single, say("next"))[0] == 200


def test_a_broken_connection_to_another_host_is_an_error_of_the_request(
    start_server: Starter,
) -> None:
    server = start_server(start=BROKEN_HOST)
    for path in PATHS:
        for stream in (True, False):
            response = start(server, path, say("x"), stream=stream).getresponse()
            assert response.status == 500
            assert "another host" in json.loads(response.read())["error"]["message"]


# A connection to some other host breaks while requests are answered.
BROKEN_HOST = """\
import mlx_optiq_ext
from mlx_lm import server
def fail(*args):
    raise ConnectionResetError("another host")
server.ResponseGenerator._make_state_machine = fail
server.main()
"""


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_the_line_is_not_served(
    server: ServerProcess, path: str
) -> None:
    # What has a seed is served alone, and all the others wait for its end.
    busy = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    first = body_for("/v1/messages", say("a" * 4, sleep=0.5), stream=False)
    busy.request("POST", "/v1/messages", json.dumps(first | {"seed": 1}))
    time.sleep(0.3)
    for _ in range(3):
        waiting = start(server, path, SLOW_PROMPT, stream=False)
        time.sleep(0.1)
        waiting.close()
    assert busy.getresponse().status == 200
    assert reply(server, say("next"))[0] == 200


def test_a_failed_request_does_not_end_the_server(single: ServerProcess) -> None:
    for path in PATHS:
        failing = say("abcdef", fail_at=3)
        response = start(single, path, failing, stream=False).getresponse()
        assert response.status == 500
        assert "scripted failure" in response.read().decode()
        response = start(single, path, failing, stream=True).getresponse()
        assert "scripted failure" in response.read().decode()
    assert reply(single, say("next"))[1]["content"][0]["text"] == "next"


def test_keep_alives_during_a_long_prompt(start_server: Starter) -> None:
    server = start_server(start=FAST_KEEP_ALIVE)
    text = say("abc", prefill_sleep=0.5)
    for path in PATHS:
        mark = "ping" if path == "/v1/messages" else ": keep-alive"
        stream = start(server, path, text + path, stream=True).getresponse()
        assert mark in stream.read().decode()


FAST_KEEP_ALIVE = """\
import mlx_optiq_ext
from mlx_optiq_ext.serving import _exchange
_exchange.KEEP_ALIVE_INTERVAL = 0.2
from mlx_lm.server import main
main()
"""

DEADLY = """\
import mlx_optiq_ext
from mlx_lm import server
def die(self):
    raise BaseException("no loop survives this")
server.TimeBudget.__iter__ = die
server.main()
"""


def test_a_dead_generation_thread_is_noticed(start_server: Starter) -> None:
    server = start_server(start=DEADLY)
    assert reply(server, say("x"))[0] == 503
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 503
    for path in PATHS:
        response = start(server, path, say("x"), stream=True).getresponse()
        assert response.status == 503
        assert json.loads(response.read())["error"]["message"]


def test_a_slow_client_does_not_hold_up_the_others(server: ServerProcess) -> None:
    with server.connect() as slow:
        slow.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 900\r\n\r\n{")
        assert reply(server, say("quick"))[0] == 200


def test_a_client_that_sends_nothing_is_let_go(start_server: Starter) -> None:
    server = start_server(start=SHORT_TIMEOUT)
    with server.connect() as silent:
        assert silent.recv(1) == b""
    with server.connect() as slow:
        slow.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 900\r\n\r\n{")
        assert b" 408 " in slow.recv(1 << 16).split(b"\r\n")[0]
    assert "Traceback" not in server.output()


SHORT_TIMEOUT = """\
import mlx_optiq_ext
from mlx_lm.server import main
from mlx_optiq_ext.patches import _classes
from mlx_optiq_ext.serving import _exchange
_classes.Handler.timeout = _exchange.IDLE_TIMEOUT = 0.2
main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_threads_and_files_are_given_back(server: ServerProcess) -> None:
    def count(kind: str) -> int:
        return sum(1 for _ in Path(f"/proc/{server.pid}/{kind}").iterdir())

    for _ in range(3):
        reply(server, say("x"))
    kinds = ("task", "fd")
    before = {kind: count(kind) for kind in kinds}
    for number in range(20):
        connection = start(server, PATHS[number % 4], SLOW, stream=number % 2 == 0)
        if number % 2 == 0:
            connection.getresponse().read(5)
        connection.close()
    for kind in kinds:
        assert eventually(lambda kind=kind: count(kind) <= before[kind] + 1)
