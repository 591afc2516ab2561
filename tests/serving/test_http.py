"""Raw requests: routes, errors, limits and keys."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

import anthropic
import openai
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
        (b'{"temperature": 1e999}', 400),
        (b'{"messages": [{"a": -1e999}]}', 400),
        (b'{"temperature": 1' + b"0" * 400 + b"}", 400),
        (b'{"a": ' + b"[" * 900 + b"1e999" + b"]" * 900 + b"}", 400),
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
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400),
        (b"Content-Length: 2, 3\r\n", 400),
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 400),
    ):
        found, body = send_raw(server, start + length + b"\r\n{}")
        assert found == status
        assert_error(path, body)
        if status in (400, 411):
            assert "Content-Length" in body["error"]["message"]


def test_one_length_may_be_said_twice(server: ServerProcess) -> None:
    data = json.dumps(MESSAGE)
    length = f"Content-Length: {len(data)}\r\n"
    head = f"POST /v1/messages HTTP/1.1\r\n{length}{length}\r\n"
    assert send_raw(server, (head + data).encode())[0] == 200


def test_a_number_that_is_too_large_is_named(server: ServerProcess) -> None:
    for path, fields in BODIES.items():
        data = json.dumps(fields)[:-1] + ', "temperature": 1e999}'
        status, _, body = ask(server, "POST", path, data.encode())
        assert status == 400
        assert "temperature: 1e999" in body["error"]["message"]
    data = b'{"messages": [{"role": "user", "x": -1e400}]}'
    message = ask(server, "POST", "/v1/messages", data)[2]["error"]["message"]
    assert "messages.0.x: -1e400" in message


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
    found, headers, body = ask(server, method, path)
    assert found == status
    assert_error(path, body)
    assert ("allow" in headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/messages", {"POST", "OPTIONS"}),
        ("GET", "/responses", {"POST", "OPTIONS"}),
        ("PUT", "/v1/responses/x", {"GET", "HEAD", "DELETE", "OPTIONS"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("HEAD", "/v1/completions", {"POST", "OPTIONS"}),
    ],
)
def test_a_method_that_is_not_allowed_is_told_which_are(
    server: ServerProcess, method: str, path: str, allowed: set[str]
) -> None:
    status, headers, _ = ask(server, method, path)
    assert status == 405
    assert set(headers["allow"].split(", ")) == allowed


def test_head_is_get_without_a_body(server: ServerProcess) -> None:
    for path in (
        "/health",
        "/v1/models",
        "/v1/models/default_model",
        "/v1/models/x/y",
        "/metrics",
        "/v1/responses/x",
    ):
        connection = server.connect()
        connection.sendall(f"HEAD {path} HTTP/1.1\r\n\r\n".encode())
        reply = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))
        connection.close()
        expected = 404 if path.endswith(("/x", "/y")) else 200
        assert int(reply.split()[1]) == expected
        assert reply.endswith(b"\r\n\r\n")
        assert reply.count(b"\r\n\r\n") == 1


PAGE = "http://page.test"


def test_a_page_of_another_origin_does_no_work(start_server: Starter) -> None:
    server = start_server("--allowed-origins", f"{PAGE},http://other.test")
    before = server.output()
    for path, fields in BODIES.items():
        for origin in (
            "http://evil.test",
            "null",
            f"{PAGE}.evil.test",
            "http://PAGE.test",
        ):
            # Browsers ask nobody before they send plain text.
            headers = {"Origin": origin, "Content_Type": "text/plain"}
            status, found, body = ask(server, "POST", path, fields, **headers)
            assert status == 403
            assert "access-control-allow-origin" not in found
            assert_error(path, body)
    for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/messages")):
        assert ask(server, method, path, None, Origin="http://evil.test")[0] == 403
    added = server.output().removeprefix(before)
    assert "Prompt" not in added
    assert "generated" not in added
    for path, fields in BODIES.items():
        status, found, _ = ask(server, "POST", path, fields, Origin=PAGE)
        assert status == 200
        assert found["access-control-allow-origin"] == PAGE
        assert ask(server, "POST", path, fields)[0] == 200


def test_an_origin_is_refused_before_the_body_is_read(start_server: Starter) -> None:
    server = start_server("--allowed-origins", PAGE)
    head = b"POST /v1/messages HTTP/1.1\r\nOrigin: http://evil.test\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: 900\r\n\r\n")
        assert b" 403 " in connection.recv(1 << 16).split(b"\r\n")[0]


def test_every_origin_is_allowed_by_default(server: ServerProcess) -> None:
    status, headers, _ = ask(server, "POST", "/v1/messages", MESSAGE, Origin=PAGE)
    assert status == 200
    assert headers["access-control-allow-origin"] == "*"


def test_a_preflight_names_the_headers_with_keys(start_server: Starter) -> None:
    server = start_server("--api-key", "k", "--allowed-origins", PAGE)
    for path in (*BODIES, "/v1/responses/x"):
        status, headers, _ = ask(server, "OPTIONS", path, None, Origin=PAGE, Host="x")
        assert status == 204
        names = headers["access-control-allow-headers"].lower().split(", ")
        assert {"authorization", "x-api-key", "content-type"} <= set(names)
        assert headers["access-control-allow-origin"] == PAGE
        assert "POST" in headers["access-control-allow-methods"]


def test_nothing_of_a_query_and_no_control_character_is_logged(
    server: ServerProcess,
) -> None:
    for method, path in (
        ("POST", "/v1/messages?token=hidden"),
        ("GET", "/nothing?token=hidden"),
        ("GET", "/\x1b[31m\x9bred"),
        ("\x1b[2J", "/x?token=hidden"),
    ):
        data = f"{method} {path} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}"
        assert send_raw(server, data.encode("latin-1"))[0] >= 400
    with server.connect() as connection:
        connection.sendall(b"POST /v1/messages?token=hidden\x1b HTTP/1.1\r\n")
        connection.sendall(b"Content-Length: 9\r\n\r\n{}")
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert ask(server, "GET", "/health")[0] == 200
    output = server.output()
    assert "hidden" not in output
    assert not {"\x1b", "\x9b"} & set(output)
    assert "/v1/messages HTTP/1.1" in output


def test_a_model_goes_by_many_names(server: ServerProcess) -> None:
    folder = str(server.folder)
    (listed,) = server.openai().models.list()
    assert (listed.id, listed.owned_by) == (folder, "mlx-lm")
    for name in ("gpt-x", "claude-opus-4.5", "default_model", folder):
        assert server.openai().models.retrieve(name).id == name
        assert server.anthropic().models.retrieve(name).display_name == name
    (entry,) = server.anthropic().models.list()
    assert entry.id == folder


def test_a_model_that_there_is_none_of(server: ServerProcess) -> None:
    for name in ("mlx-community/nothing", "x", "../x"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.openai().models.retrieve(name)
        assert caught.value.code == "model_not_found"
    assert ask(server, "GET", "/v1/models/mlx-community/nothing")[0] == 404
    with pytest.raises(anthropic.NotFoundError):
        server.anthropic().models.retrieve("x")


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


FORGETFUL = """\
import threading
import mlx_optiq_ext
from mlx_lm import server
class Tokenizer:
    # To all but the generation thread every second look finds a model being loaded.
    looks = 0
    def __set__(self, provider, value):
        provider.__dict__["tokenizer"] = value
    def __get__(self, provider, owner=None):
        if "_run_generate" not in threading.current_thread().name:
            self.looks += 1
            if self.looks % 2 == 0:
                return None
        return provider.__dict__["tokenizer"]
server.ModelProvider.tokenizer = Tokenizer()
server.main()
"""


def test_a_model_that_is_loaded_meanwhile_is_no_mistake_of_the_client(
    start_server: Starter,
) -> None:
    server = start_server(start=FORGETFUL)
    prefill = [*MESSAGE["messages"], {"role": "assistant", "content": "so"}]
    for _ in range(3):
        for path in ("/v1/messages/count_tokens", "/v1/responses/input_tokens"):
            assert ask(server, "POST", path, BODIES[path])[0] == 200
        body = MESSAGE | {"messages": prefill}
        assert ask(server, "POST", "/v1/messages", body)[0] == 200


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
