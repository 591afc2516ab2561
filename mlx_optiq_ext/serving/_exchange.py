"""One request over HTTP and its reply."""

from __future__ import annotations

import functools
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ._access import cors_headers
from ._client import CHUNK_SIZE, Client
from ._errors import APIError, anthropic_body, bad_request, openai_body
from ._metrics import Measurement

if TYPE_CHECKING:
    from ._generation import Sequence

Body = dict[str, Any]

MAX_REQUEST_SIZE = 32 << 20
MAX_LOGGED = 200  # characters of what a client sent

# Seconds.
IDLE_TIMEOUT = 60.0  # without a byte from a client, or one that it takes
BODY_TIMEOUT = 300.0  # for all of a body
WAIT_INTERVAL = 0.25  # between two looks at the client while nothing happens
KEEP_ALIVE_INTERVAL = 10.0

# Digits of an integer: longer ones are infinite for all that computes with floats.
MAX_DIGITS = 308

# Half of a character beyond the first 65,536.
SURROGATE = re.compile("[\ud800-\udfff]")


class Reply(Protocol):
    """The part of a reply that keeps a stream alive."""

    def keep_alive(self) -> Body | None: ...


class Exchange:
    """Reads a request from one of mlx-lm's handlers, and writes through it.

    Args:
        handler (APIHandler): The handler that has read the request's head.
    """

    def __init__(self, handler: Any):
        self.handler = handler
        self._wfile = handler.wfile
        self.client = handler.wfile = Client(handler)
        self.generator = handler.response_generator
        self.path, _, self.query = handler.path.partition("?")
        self.is_anthropic = self.path.startswith("/v1/messages")
        self.request_id = f"req_{uuid.uuid4().hex}"
        # What is generated for the client.
        self.sequences: list[Sequence] = []
        self.measured = Measurement()
        self._stream: Reply | None = None
        self._has_body = has_body(handler.headers)
        self._last_sent = time.monotonic()

    @property
    def cli_args(self) -> Any:
        return self.generator.cli_args

    @property
    def place(self) -> str:
        """The method and the path, fit for the log."""
        return printable(f"{self.handler.command} {self.path}")

    @property
    def is_started(self) -> bool:
        """Whether the status and the headers of the reply are on their way."""
        return self.client.has_begun

    def read_body(self) -> bytes:
        """The body.

        Raises:
            APIError: 400, 408, 411, 413 or 415, if there is none that can be read.
        """
        encoding = self.handler.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise APIError(415, f"Content-Encoding {encoding!r} is not supported")
        size = self._body_size()
        chunks, deadline = [], time.monotonic() + BODY_TIMEOUT
        while size:
            chunk = self._read_chunk(min(size, CHUNK_SIZE), deadline)
            size -= len(chunk)
            chunks.append(chunk)
        self._has_body = False
        return b"".join(chunks)

    def read_json(self) -> Body:
        """The object that the body is.

        Raises:
            APIError: 400, if it is none, or as for `read_body`.
        """
        return parse_object(self.read_body())

    def send_json(
        self, status: int, body: Body, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        self._send_head(
            status,
            {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **(headers or {}),
            },
        )
        self._write(data)

    def send_text(self, data: bytes, content_type: str) -> None:
        headers = {"Content-Type": content_type, "Content-Length": str(len(data))}
        self._send_head(200, headers)
        self._write(data)

    def send_head(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Answer with headers only."""
        self._send_head(status, {"Content-Length": "0", **(headers or {})})

    def send_error(self, error: APIError) -> None:
        """Answer with an error, in the words of the API that the path belongs to."""
        if self.is_anthropic:
            body = anthropic_body(error, self.request_id)
        else:
            body = openai_body(error)
        # Headers of a reply that was to be a good one may be waiting there.
        self.handler._headers_buffer = []
        self.send_json(error.status, body, error.headers)

    def open_stream(self, reply: Reply) -> None:
        """From now on the reply is a stream, which starts with the first event."""
        self._stream = reply

    def send_event(self, event: Body | str) -> None:
        """Add an event to the stream; a text is sent as it is."""
        self._start_stream()
        self._write(frame(event).encode())

    def check(self) -> None:
        """Keep the connection alive while nothing happens.

        Raises:
            ClientGone: If the client has left.
        """
        self.client.check()
        is_quiet = time.monotonic() - self._last_sent > KEEP_ALIVE_INTERVAL
        if self._stream is not None and is_quiet:
            self._keep_alive(self._stream)

    def close(self) -> None:
        """Stop the generation, and let the client read an early answer."""
        for sequence in self.sequences:
            sequence.inbox.close()
        if self._has_body:
            self.client.drain()
        self.handler.wfile = self._wfile

    def _body_size(self) -> int:
        values = set(self.handler.headers.get_all("Content-Length", ()))
        if not values:
            raise APIError(411, "Content-Length header is required")
        # Two ends of a connection that disagree on where a request ends are a way in.
        if len(values) > 1:
            raise bad_request(f"Content-Length: got several, {sorted(values)}")
        if "Transfer-Encoding" in self.handler.headers:
            raise bad_request("Content-Length: not allowed with Transfer-Encoding")
        (value,) = values
        if not value.isascii() or not value.isdigit():
            raise bad_request(f"Content-Length: expected a number, got {value!r}")
        limit = getattr(self.cli_args, "max_request_size", MAX_REQUEST_SIZE)
        # Python refuses to read numbers of very many digits.
        if len(value) > 18 or int(value) > limit:
            raise APIError(413, f"the body has {value} bytes, at most {limit} are read")
        return int(value)

    def _read_chunk(self, size: int, deadline: float) -> bytes:
        try:
            chunk = self.client.read(size)
        except TimeoutError as exc:
            raise APIError(408, "the body did not arrive in time") from exc
        if time.monotonic() > deadline:
            raise APIError(408, "the body did not arrive in time")
        if not chunk:
            raise bad_request("the body is shorter than its Content-Length")
        return chunk

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        handler = self.handler
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("request-id", self.request_id)
        handler.send_header("x-request-id", self.request_id)
        origins = self.cli_args.allowed_origins
        for name, value in cors_headers(handler.headers, origins).items():
            handler.send_header(name, value)
        handler.end_headers()

    def _start_stream(self) -> None:
        if not self.is_started:
            self._send_head(
                200,
                {
                    "Content-Type": "text/event-stream",
                    "Cache-Control": "no-cache",
                    "Connection": "close",
                },
            )

    def _write(self, data: bytes) -> None:
        self.client.write(data)
        self._last_sent = time.monotonic()

    def _keep_alive(self, reply: Reply) -> None:
        self._start_stream()
        event = reply.keep_alive()
        if event is None:
            self._write(b": keep-alive\n\n")
        else:
            self.send_event(event)


def frame(event: Body | str) -> str:
    """A server-sent event, named by its type if it has one."""
    if isinstance(event, str):
        return f"data: {event}\n\n"
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n"


def has_body(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers


def parse_object(data: bytes) -> Body:
    """The JSON object in a body.

    Raises:
        APIError: 400, if it is something else.
    """
    infinite: list[str] = []
    # A nesting can be deeper than Python is willing to read.
    try:
        value = _load(data.decode(), functools.partial(_read_number, infinite))
    except (ValueError, RecursionError) as exc:
        raise bad_request(f"Invalid JSON in request body: {exc}") from exc
    if not isinstance(value, dict):
        raise bad_request("the request body has to be a JSON object")
    if infinite:
        path = _path_of_infinity(value)
        raise bad_request(
            f"{path}: {printable(infinite[0])} is too large for a number", param=path
        )
    return value


def printable(text: str) -> str:
    """Text of a client with all that could disturb a terminal or a log escaped."""
    return ascii(text[:MAX_LOGGED])[1:-1]


def _load(text: str, read_number: Callable[[str], int | float]) -> Any:
    value = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=read_number,
        parse_int=read_number,
    )
    if "\\ud" not in text and "\\uD" not in text:
        return value
    # Clients that cut a text anywhere send half a character, which no tokenizer takes.
    whole = SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    return json.loads(whole)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _read_number(infinite: list[str], text: str) -> int | float:
    """A number; what is too large for one is remembered."""
    if text.lstrip("-").isdecimal() and len(text) <= MAX_DIGITS:
        return int(text)
    number = float(text)
    if math.isinf(number):
        infinite.append(text)
    return number


def _path_of_infinity(body: Body) -> str | None:
    """Where in a JSON object the first infinite number is.

    None if it was the value of a key that occurs again.
    """
    places: list[tuple[str, Any]] = [("", body)]
    while places:
        path, value = places.pop()
        if isinstance(value, float) and math.isinf(value):
            return path.removeprefix(".")
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = [(f"{path}.{name}", each) for name, each in items]
            places += reversed(inner)
    return None
