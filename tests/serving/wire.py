"""What a client without an SDK sees of a reply."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from .conftest import TIMEOUT, ServerProcess

Body = dict[str, Any]


class Frame(NamedTuple):
    """A server-sent event: its name, "" if it has none, and its data."""

    name: str
    data: Any


class Reply(NamedTuple):
    """A status, headers with lower-case names, and what follows them."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def body(self) -> Body:
        return json.loads(self.data)

    @property
    def frames(self) -> list[Frame]:
        """The events of a stream, without comments.

        Raises:
            ValueError: If one is not written as every client reads it.
        """
        assert self.headers["content-type"] == "text/event-stream"
        assert self.data.endswith(b"\n\n")
        blocks = self.data.decode().removesuffix("\n\n").split("\n\n")
        return [_frame(block) for block in blocks if not block.startswith(":")]

    @property
    def events(self) -> list[Body]:
        """The objects of a stream."""
        return [frame.data for frame in self.frames if frame.data != "[DONE]"]


def _frame(block: str) -> Frame:
    *names, data = block.split("\n")
    name = "".join(names)
    if not data.startswith("data: ") or not (not name or name.startswith("event: ")):
        raise ValueError(f"{block!r} is no event")
    text = data.removeprefix("data: ")
    name = name.removeprefix("event: ")
    return Frame(name, text if text == "[DONE]" else json.loads(text))


def post(
    server: ServerProcess,
    path: str,
    body: Any,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send a body as JSON."""
    return request(server, "POST", path, json.dumps(body), headers)


def get(server: ServerProcess, path: str) -> Reply:
    return request(server, "GET", path)


def request(
    server: ServerProcess,
    method: str,
    path: str,
    data: str | bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    try:
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, given)
        reply = connection.getresponse()
        names = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, names, reply.read())
    finally:
        connection.close()
