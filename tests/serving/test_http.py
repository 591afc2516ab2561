"""Raw requests: routes, errors, limits and keys."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

import pytest

from .conftest import ServerProcess, Starter
from .scripted import say

MESSAGE = {"model": "claude-x", "max_tokens": 9}
MESSAGE |= {"messages": [{"role": "user", "content": say("abc")}]}
RESPONSE = {"model": "gpt-x", "input": say("abc"), "max_output_tokens": 9}
CHAT = {"messages": MESSAGE["messages"]}
BODIES = {
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": MESSAGE,
    "/v1/responses": RESPONSE,
    "/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
}


def ask(
    server: ServerProcess,
    method: str,
    path: str,
    body: Any = None,
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of a reply."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, data, names)
        reply = connection.getresponse()
        text = reply.read()
    finally:
        connection.close()
    found = {name.lower(): value for name, value in reply.getheaders()}
    return reply.status, found, json.loads(text) if text else None


def send_raw(server: ServerProcess, data: bytes) -> tuple[int, Any]:
    """Status and body of the reply to bytes."""
    with server.connect() as connection:
        connection.sendall(data)
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def assert_error(path: str, body: Any) -> None:
    error = body["error"]
    assert error["message"]
    assert error["type"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert body["request_id"]
    else:
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("query", ["", "?beta=true&x=%zz"])
def test_routes_with_and_without_a_query(
    server: ServerProcess, path: str, query: str
) -> None:
    status, _, body = ask(server, "POST", path + query, BODIES[path])
    assert status == 200
    assert "error" not in body or body["error"] is None


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"model": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b"{}", 400),
    ],
)
def test_bodies_that_are_no_request(
    server: ServerProcess, path: str, data: bytes, status: int
) -> None:
    found, headers, body = ask(server, "POST", path, data)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert headers["request-id"] == headers["x-request-id"]
    assert_error(path, body)


@pytest.mark.parametrize("path", BODIES)
def test_lengths_that_are_none(server: ServerProcess, path: str) -> None:
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
    for length, status in (
        (b"", 411),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"Content-Length: x\r\n", 400),
        (b"Content-Length: -1\r\n", 400),
        (b"Content-Length: 99999999999999999999999\r\n", 413),
        (b"Content-Length: 33554433\r\n", 413),
        (b"Content-Length: 2\r\nContent-Encoding: zstd\r\n", 415),
    ):
        found, body = send_raw(server, start + length + b"\r\n{}")
        assert found == status
        assert_error(path, body)


def test_a_body_over_the_limit_gets_its_answer(start_server: Starter) -> None:
    server = start_server("--max-request-size", "1K")
    status, _, body = ask(server, "POST", "/v1/messages", b"x" * (8 << 20))
    assert status == 413
    assert body["error"]["type"] == "request_too_large"
    assert ask(server, "POST", "/v1/messages", b"x" * 1024)[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
        ("POST", "/nothing", 404),
        ("POST", "/v1/messages/", 404),
        ("GET", "/v1/messages", 405),
        ("PUT", "/v1/responses", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/responses", 405),
        ("GET", "/v1/responses/resp_x", 404),
        ("GET", "/v1/responses/resp_x/input_items", 404),
        ("DELETE", "/v1/responses/resp_x?x", 404),
        ("POST", "/v1/responses/resp_x/cancel", 404),
        ("BREW", "/v1/messages", 405),
    ],
)
def test_paths_and_methods_that_are_none(
    server: ServerProcess, method: str, path: str, status: int
) -> None:
    found, _, body = ask(server, method, path)
    assert found == status
    assert_error(path, body)


def test_probes(server: ServerProcess) -> None:
    for path in ("/", "/api/hello", "/?x=1", "/health"):
        assert ask(server, "HEAD", path)[0] == 200
    assert ask(server, "HEAD", "/nothing")[0] == 404
    assert ask(server, "GET", "/health?x=1")[2] == {"status": "ok"}
    status, _, body = ask(server, "GET", "/v1/models?limit=5")
    assert status == 200
    assert [model["id"] for model in body["data"]] == [str(server.folder)]
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("OPTIONS", "/v1/messages")
    assert connection.getresponse().status == 204


def test_web_sockets_are_told_to_use_http(server: ServerProcess) -> None:
    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    for path in ("/v1/responses", "/v1/responses?model=x", "/responses"):
        assert ask(server, "GET", path, None, **headers)[0] == 426


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_an_error(server: ServerProcess, data: bytes) -> None:
    status, body = send_raw(server, data)
    assert 400 <= status < 600
    assert_error("", body)


def test_a_key_guards_all_but_the_probes(start_server: Starter) -> None:
    server = start_server("--api-key", "sécret")
    assert ask(server, "GET", "/health")[0] == 200
    assert ask(server, "HEAD", "/")[0] == 200
    for path, fields in BODIES.items():
        status, headers, body = ask(server, "POST", path, fields)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert_error(path, body)
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/responses/x"),
        ("DELETE", "/v1/responses/x"),
    ):
        assert ask(server, method, path)[0] == 401
    key = "sécret".encode().decode("latin-1")
    for headers in (
        {"x_api_key": key},
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer  {key}"},
    ):
        assert ask(server, "POST", "/v1/messages", MESSAGE, **headers)[0] == 200
    for headers in (
        {"x_api_key": "secret"},
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"x_api_key": ""},
    ):
        assert ask(server, "POST", "/v1/messages", MESSAGE, **headers)[0] == 401


def test_binding_elsewhere_without_a_key_is_warned_about(start_server: Starter) -> None:
    open_server = start_server("--host", "0.0.0.0")
    assert open_server.output().count("no --api-key") == 1
    assert "no --api-key" not in start_server("--host", "127.0.0.1").output()
    guarded = start_server("--host", "0.0.0.0", "--api-key", "k")
    assert "no --api-key" not in guarded.output()


def test_an_early_end_of_the_body(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        assert b"400" in connection.recv(1 << 16).split(b"\r\n")[0]


def test_a_client_that_resets_the_connection_leaves_no_traceback(
    server: ServerProcess,
) -> None:
    for data in (b"", b"POST /v1/me", b"POST /v1/messages HTTP/1.1\r\n"):
        with server.connect() as connection:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(data)
    assert ask(server, "GET", "/health")[0] == 200
    assert "ConnectionResetError" not in server.output()


def test_an_error_of_a_stream_that_did_not_start_has_a_status(
    server: ServerProcess,
) -> None:
    for path, fields in (("/v1/messages", MESSAGE), ("/v1/responses", RESPONSE)):
        wrong = fields | {"stream": True, "temperature": -1}
        assert ask(server, "POST", path, wrong)[0] == 400
