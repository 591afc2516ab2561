"""Who may talk to the Lab, and how far a request reaches."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

import mlx_optiq_ext
from mlx_optiq_ext.lab._chat import read_request
from mlx_optiq_ext.lab._guard import Guard

from .conftest import START, LabProcess

PAGE = Path(mlx_optiq_ext.__file__).parent / "lab" / "page"
ROUTES = ("start", "stop", "command", "check", "chat", "bench", "download", "models")


def get(lab: LabProcess, path: str = "/", **headers: str) -> httpx2.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lab.client.get(path, headers=names)


def test_nothing_is_shown_without_the_token(lab):
    with httpx2.Client(base_url=lab.base) as stranger:
        for path in ("/", "/app.js", "/api/events", "/?token=guess", "/?token="):
            reply = stranger.get(path)
            assert reply.status_code == 401
            assert "token" in reply.text
        for route in ROUTES:
            assert stranger.post(f"/api/{route}", json={}).status_code == 401


def test_the_token_becomes_a_cookie_of_this_site_and_leaves_the_address(lab):
    with httpx2.Client() as client:
        reply = client.get(lab.url)
        assert reply.status_code == 200
        assert reply.headers["refresh"] == "0; url=/"
        cookie = reply.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        port = lab.base.rpartition(":")[2]
        assert cookie.startswith(f"mlx_lab_{port}=")
        assert client.get(lab.base).status_code == 200
        # Who has the cookie and opens the address again gets rid of the token too.
        assert client.get(lab.url).status_code == 303


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_name_for_this_machine_is_refused(lab, host):
    assert get(lab, host=host).status_code == 403
    reply = lab.client.post("/api/stop", json={}, headers={"host": host})
    assert reply.status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        # Another port of this machine is the same site to a browser.
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_elsewhere_can_neither_act_nor_read(lab, headers):
    for path in ("/app.js", "/api/events"):
        assert lab.client.get(path, headers=headers).status_code == 403
    for route in ROUTES:
        reply = lab.client.post(f"/api/{route}", json={}, headers=headers)
        assert reply.status_code == 403


def test_the_page_itself_may_ask(lab):
    headers = {"origin": lab.base, "sec-fetch-site": "same-origin"}
    reply = lab.client.post(
        "/api/command", json={"model": "demo/qwen"}, headers=headers
    )
    assert reply.status_code == 200


def test_a_form_cannot_be_sent(lab):
    reply = lab.client.post("/api/stop", content="{}")
    assert reply.status_code == 415


def test_a_request_of_any_length_is_refused_before_it_is_kept(lab):
    reply = lab.client.post("/api/command", json={"model": "x" * (9 << 20)})
    assert reply.status_code == 413


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"model": {}}'])
def test_malformed_requests_are_explained(lab, body):
    headers = {"content-type": "application/json"}
    for route in ("command", "start", "check", "chat", "download"):
        reply = lab.client.post(f"/api/{route}", content=body, headers=headers)
        assert reply.status_code == 400, route
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize("body", ["[" * 200_000, '{"messages": ' + "[" * 200_000])
def test_what_is_nested_without_end_is_refused(lab, body):
    headers = {"content-type": "application/json"}
    for route in ("command", "chat"):
        reply = lab.client.post(f"/api/{route}", content=body, headers=headers)
        assert reply.status_code == 400
        assert "nested" in reply.json()["error"]["message"]
    assert "Traceback" not in lab.log.read_text()


def test_the_type_of_a_body_may_name_its_encoding(lab):
    headers = {"content-type": "application/json; charset=utf-8"}
    body = '{"model": "demo/qwen"}'
    reply = lab.client.post("/api/command", content=body, headers=headers)
    assert reply.status_code == 200


def test_a_websocket_is_refused(lab):
    host, _, port = lab.base.removeprefix("http://").partition(":")
    request = (
        f"GET /api/events HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request.encode())
        status = connection.makefile().readline()
    assert re.search(r" 40[13] ", status), status


@pytest.mark.parametrize(
    ("host", "port", "name"),
    [
        ("127.0.0.1", 80, "127.0.0.1"),
        ("localhost", 80, "localhost:80"),
        ("::1", 80, "[::1]"),
        ("::1", 7860, "[::1]:7860"),
    ],
)
def test_browsers_leave_the_usual_port_out(host, port, name):
    app = Guard(
        Starlette(routes=[Route("/", lambda _: Response("ok"))]), "t", host, port
    )
    with TestClient(app, base_url=f"http://{name}", follow_redirects=False) as client:
        assert client.get("/?token=t").status_code == 200
        headers = {"origin": f"http://{name}", "cookie": f"mlx_lab_{port}=t"}
        assert client.get("/", headers=headers).text == "ok"


@pytest.mark.parametrize(
    "path",
    ["/../_app.py", "/%2e%2e/_app.py", "/page/app.js", "/etc/passwd"],
)
def test_no_path_of_a_request_opens_a_file(lab, path):
    assert lab.client.get(path).status_code == 404


def test_only_what_is_in_the_list_can_be_started(lab, tmp_path):
    for name in ("/etc", str(PAGE), "Qwen/Qwen3.5-9B", "../demo_model"):
        reply = lab.post("start", {"model": name})
        assert reply.status_code == 400
        assert "not in the list" in reply.json()["error"]["message"]
    reply = lab.post("download", {"repo_id": "../../etc"})
    assert reply.status_code == 400


def test_the_page_may_load_nothing_from_elsewhere(lab):
    policy = get(lab).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    for file in PAGE.iterdir():
        addresses = set(re.findall(r"https?://[\w.]+", file.read_text()))
        assert addresses <= {"http://www.w3.org"}, file.name


def test_the_page_makes_no_html_of_text():
    for file in PAGE.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|DOMParser",
            file.read_text(),
        ), file.name


def test_every_file_of_the_page_is_installed():
    root = Path(mlx_optiq_ext.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    globs = settings["tool"]["setuptools"]["package-data"]["*"]
    for file in PAGE.iterdir():
        assert any(file.match(glob) for glob in globs), file.name


def test_the_page_is_small():
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 150_000


def test_a_conversation_cannot_name_models_or_files():
    body = {
        "messages": [{"role": "user", "content": "Hi", "images": ["/etc/passwd"]}],
        "model": "/etc",
        "adapters": "/etc",
        "draft_model": "/etc",
        "temperature": 0.5,
    }
    found = read_request(body)
    assert found["messages"] == [{"role": "user", "content": "Hi"}]
    assert found["temperature"] == 0.5
    assert not {"model", "adapters", "draft_model"} & set(found)


@pytest.mark.parametrize(
    "message",
    [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "/x"}}],
        },
        {"role": "root", "content": "Hi"},
        {"content": "Hi"},
        "Hi",
    ],
)
def test_messages_are_text_of_known_roles(message):
    with pytest.raises(ValueError, match="expected"):
        read_request({"messages": [message]})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org"])
def test_the_lab_listens_on_this_machine_only(host):
    result = run_lab("--host", host)
    assert result.returncode == 1
    assert "this machine only" in result.stderr


def test_a_port_of_the_lab_that_is_in_use_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = run_lab("--port", str(other.getsockname()[1]))
    assert result.returncode == 1
    assert "cannot be used" in result.stderr


@pytest.mark.parametrize("name", ["no/such/folder", str(PAGE)])
def test_a_model_that_is_none_is_told(name):
    result = run_lab("--model", name)
    assert result.returncode == 1
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    "name", ["starlette", "uvicorn", "httpx2", "prometheus_client"]
)
def test_without_its_extra_the_lab_names_it(name):
    start = f"import sys; sys.modules[{name!r}] = None; {START}"
    result = run_lab(start=start)
    assert result.returncode == 1
    assert "pip install 'mlx-optiq-ext[lab]'" in result.stderr
    assert "Traceback" not in result.stderr


def run_lab(*flags: str, start: str = START) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", start, "lab", "--no-browser", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
