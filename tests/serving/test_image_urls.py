"""Images that are named by a URL: what is fetched, and what a client learns of it."""

from __future__ import annotations

import base64
import http.server
import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import server as upstream

from mlx_optiq_ext.serving._images import is_public

from .conftest import ServerProcess, Starter
from .scripted import make_model, say
from .test_http import ask
from .test_images import picture

pytestmark = pytest.mark.skipif(
    not hasattr(upstream, "_inline_image_urls"), reason="this mlx-lm takes no images"
)

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
RESPONSES, COUNT = "/v1/responses", "/v1/messages/count_tokens"
PATHS = (CHAT, MESSAGES, RESPONSES, COUNT)
PUBLIC = "93.184.216.34"

# The Internet of these tests has names, and one public address: the test's own host.
# A name with a list of addresses gives one after the other.
INTERNET = """\
import socket
import mlx_optiq_ext
from mlx_optiq_ext.serving import _images
_images.MAX_SECONDS, _images.MAX_BYTES = 2.0, 200_000
NAMES = {{"images.test": ["{public}"], "private.test": ["10.0.0.7"],
    "changing.test": ["{public}", "127.0.0.1"], "mixed.test": ["{public} 127.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"]}}
look_up, connect = socket.getaddrinfo, socket.create_connection
def find(host, port, *args, **kwargs):
    if host not in NAMES:
        return look_up(host, port, *args, **kwargs)
    addresses = NAMES[host]
    found = addresses.pop(0) if len(addresses) > 1 else addresses[0]
    return [(None, socket.SOCK_STREAM, 6, "", (a, port)) for a in found.split()]
def reach(place, *args, **kwargs):
    if place == ("{public}", 80):
        place = ("127.0.0.1", {port})
    return connect(place, *args, **kwargs)
socket.getaddrinfo, socket.create_connection = find, reach
from mlx_lm.server import main
main()
"""


class ImageHost(http.server.ThreadingHTTPServer):
    """A host with a picture, and with answers that are none."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.is_over = threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ImageHost

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.partition("?")[0].strip("/").partition("/")[0]
        getattr(self, f"_{name}", self._missing)()

    def _picture(self) -> None:
        self._answer(200, picture(3), "image/png")

    def _text(self) -> None:
        self._answer(200, picture(3), "text/html")

    def _missing(self) -> None:
        self._answer(404, picture(3), "image/png")

    def _redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.path.removeprefix("/redirect/"))
        self.end_headers()

    def _large(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        while True:
            self.wfile.write(bytes(1 << 16))

    def _slow(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while not self.server.is_over.wait(0.1):
            self.wfile.write(b"x: y\r\n")

    def _reset(self) -> None:
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        self.connection.setsockopt(1, 13, linger)
        self.connection.close()

    def _cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", "9999999")
        self.end_headers()

    def _answer(self, status: int, data: str, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(base64.b64decode(data))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[ImageHost]:
    host = ImageHost()
    host.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    yield host
    host.is_over.set()
    host.shutdown()
    thread.join()
    host.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), takes_images=True)


@pytest.fixture(scope="module")
def start_text(host: ImageHost) -> str:
    return INTERNET.format(public=PUBLIC, port=host.port)


@pytest.fixture(scope="module")
def fetching(start_server: Starter, model: Path, start_text: str) -> ServerProcess:
    return start_server("--allow-remote-images", folder=model, start=start_text)


def body_for(path: str, url: str) -> dict[str, Any]:
    source = {"type": "url", "url": url}
    if url.startswith("data:image/png;base64,"):
        data = url.partition(",")[2]
        source = {"type": "base64", "media_type": "image/png", "data": data}
    image: dict[str, Any] = {
        CHAT: {"type": "image_url", "image_url": {"url": url}},
        RESPONSES: {"type": "input_image", "image_url": url},
    }.get(path, {"type": "image", "source": source})
    kind = "input_text" if path == RESPONSES else "text"
    messages = [{"role": "user", "content": [image, {"type": kind, "text": say("a")}]}]
    if path == RESPONSES:
        return {"input": messages}
    return {"messages": messages, "max_tokens": 9, "model": "claude-x"}


def num_prompt_tokens(body: dict[str, Any]) -> int:
    usage = body.get("usage", body)
    cached = usage.get("cache_read_input_tokens", 0)
    return usage.get("prompt_tokens", usage.get("input_tokens", 0) + cached)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_takes_no_images_fetches_none(
    start_server: Starter, start_text: str, host: ImageHost, path: str
) -> None:
    server = start_server("--allow-remote-images", start=start_text)
    asked = list(host.asked)
    url = "http://images.test/picture"
    status, _, body = ask(server, "POST", path, body_for(path, url))
    assert status == 400
    assert "takes no images" in body["error"]["message"]
    assert host.asked == asked


def test_a_model_that_has_to_be_loaded_first_fetches_none_either(
    fetching: ServerProcess, scripted_folder: Path, model: Path, host: ImageHost
) -> None:
    asked = list(host.asked)
    body = body_for(CHAT, "http://images.test/picture") | {
        "model": str(scripted_folder)
    }
    assert ask(fetching, "POST", CHAT, body)[0] == 400
    assert host.asked == asked
    body["model"] = str(model)
    assert ask(fetching, "POST", CHAT, body)[0] == 200


def test_without_the_flag_only_data_is_taken(
    start_server: Starter, model: Path, start_text: str, host: ImageHost
) -> None:
    server = start_server(folder=model, start=start_text)
    asked = list(host.asked)
    for path in PATHS:
        for url in ("http://images.test/picture", "file:///etc/passwd", "DATA:,"):
            status, _, body = ask(server, "POST", path, body_for(path, url))
            assert status == 400
            assert "--allow-remote-images" in body["error"]["message"]
        data = f"data:image/png;base64,{picture(3)}"
        assert ask(server, "POST", path, body_for(path, data))[0] == 200
    assert host.asked == asked


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "url",
    [
        "http://images.test/picture?x=1",
        "http://images.test/redirect//picture",
    ],
)
def test_a_picture_of_a_public_host_is_seen_like_one_in_the_request(
    fetching: ServerProcess, path: str, url: str
) -> None:
    data = f"data:image/png;base64,{picture(3)}"
    _, _, expected = ask(fetching, "POST", path, body_for(path, data))
    status, _, found = ask(fetching, "POST", path, body_for(path, url))
    assert status == 200
    assert num_prompt_tokens(found) == num_prompt_tokens(expected)


def test_an_address_is_looked_up_once(fetching: ServerProcess) -> None:
    body = body_for(CHAT, "http://changing.test/picture")
    assert ask(fetching, "POST", CHAT, body)[0] == 200
    assert ask(fetching, "POST", CHAT, body)[0] == 400


def test_every_failure_looks_the_same(fetching: ServerProcess, host: ImageHost) -> None:
    own = f"127.0.0.1:{host.port}/picture"
    places = [
        *(f"http://{own}", f"http://localhost:{host.port}/picture"),
        f"http://[::ffff:127.0.0.1]:{host.port}/picture",
        f"http://2130706433:{host.port}/picture",
        f"http://mapped.test:{host.port}/picture",
        f"http://mixed.test:{host.port}/picture",
        *("http://127.0.0.1:1/", "http://169.254.169.254/latest", "http://0/"),
        *(
            "http://private.test/picture",
            "http://nowhere.invalid/",
            "http://[fe80::1]/",
        ),
        f"http://images.test/redirect/http://{own}",
        f"http://images.test/redirect/http://mapped.test:{host.port}/picture",
        "http://images.test/redirect/http://private.test/",
        "http://images.test/redirect/data:image/png;base64,AAAA",
        f"http://images.test{'/redirect' * 9}/picture",
        "http://images.test/redirect/file:///etc/passwd",
        *("file:///etc/passwd", "ftp://images.test/picture", "http:///", "x", ""),
        *("http://images.test:x/", "http://images.test/\r\nx", "https://images.test/"),
        *(f"http://images.test/{name}" for name in ("missing", "text", "large")),
        *(f"http://images.test/{name}" for name in ("slow", "reset", "cut")),
    ]
    asked = len(host.asked)
    for path in (CHAT, MESSAGES, RESPONSES):
        answers = set()
        for url in places if path == CHAT else places[::6]:
            status, _, body = ask(fetching, "POST", path, body_for(path, url))
            answers.add((status, str(body["error"])))
        assert len(answers) == 1
        ((status, error),) = answers
        assert status == 400
        assert "an image could not be fetched" in error
    assert not any(path.startswith("/picture") for path in host.asked[asked:])


def test_the_images_of_a_request_share_their_limits(fetching: ServerProcess) -> None:
    data = body_for(CHAT, "http://images.test/slow")
    content = data["messages"][0]["content"]
    content[:0] = [content[0]] * 200
    assert ask(fetching, "POST", CHAT, data)[0] == 400


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", ["", "AAAA", "a", "!!"])
def test_an_image_that_is_none_is_a_mistake_of_the_client(
    fetching: ServerProcess, path: str, data: str
) -> None:
    broken = picture(2)[: len(picture(2)) // 2] + data
    for text in (data, broken):
        url = f"data:image/png;base64,{text}"
        status, _, body = ask(fetching, "POST", path, body_for(path, url))
        assert status == 400
        assert body["error"].get("code") != "model_not_found"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1"),
        *("240.0.0.1", "255.255.255.255", "192.0.2.1", "203.0.113.5", "239.1.1.1"),
        *("::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2002:a00:1::1", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        "2001:0:0:0:0:0:80ff:fffe",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, "2606:2800:220:1::1", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
