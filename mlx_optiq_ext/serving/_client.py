"""The client's own socket, told apart from every other that a request may open.

A client that has shut down its side of the connection for writing may still read. It
looks exactly like a client that has left, until something is sent: the machine of a
client that has left refuses what arrives, and the refusal is an error of the socket.

Invariant: a client that still reads gets its reply to the last byte, and nothing that
is not part of it.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Any

from ._errors import ClientGone

CHUNK_SIZE = 1 << 16

# Seconds.
PROBE_INTERVAL = 0.25
MAX_PROBE_INTERVAL = 10.0  # in a stream, where a probe costs nothing
DRAIN_TIMEOUT = 5.0  # for the rest of a body that nobody wants

COMMENT = b": keep-alive\n\n"


class Client:
    """The end of a connection at which a client sends a request and reads a reply.

    It takes the place of a handler's ``wfile``: whoever writes a reply finds out here,
    and by no other exception, that the client has left.

    Args:
        handler (BaseHTTPRequestHandler): The handler that has read the request's head.
    """

    def __init__(self, handler: Any):
        self._connection = handler.connection
        self._rfile, self._wfile = handler.rfile, handler.wfile
        self._has_no_body = handler.command == "HEAD"
        # Every reply begins with these bytes, so they can be sent before it is known.
        self._opening = f"{handler.protocol_version} ".encode()
        self._num_sent = 0  # bytes of the opening
        self._has_sent_everything = False
        self._probe_interval = PROBE_INTERVAL
        self._next_check = self._next_probe = 0.0
        self.has_begun = False  # whether the status is on its way

    def read(self, size: int) -> bytes:
        """At least one byte and at most ``size`` of them, none at the end of the input.

        Raises:
            ClientGone: If the connection broke.
            TimeoutError: If nothing arrived in time.
        """
        try:
            return self._rfile.read1(size)
        except ConnectionError as exc:
            raise ClientGone(f"the connection broke: {exc}") from exc

    def write(self, data: bytes) -> int:
        """Send a piece of the reply; the first piece holds the status and the headers.

        Raises:
            ClientGone: If the client has left or takes nothing any more.
        """
        if not self.has_begun:
            self.has_begun = True
            self._send(data[self._num_sent :])
        elif not self._has_no_body:
            self._send(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: all that is written is sent at once."""

    def check(self) -> None:
        """Find out whether the client is still there, every now and then.

        Raises:
            ClientGone: If it has left.
        """
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + PROBE_INTERVAL
        if error := self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise ClientGone(f"the client closed the connection (error {error})")
        if not self._has_sent_everything:
            self._has_sent_everything = self._is_at_end()
        if self._has_sent_everything and now >= self._next_probe:
            self._next_probe = now + self._probe_interval
            self._probe_interval *= 2
            self._probe()

    def drain(self) -> None:
        """Read what the client is still sending.

        A connection that is closed before that loses the answer on its way.
        """
        deadline = time.monotonic() + DRAIN_TIMEOUT
        try:
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(DRAIN_TIMEOUT)
            while time.monotonic() < deadline and self._connection.recv(CHUNK_SIZE):
                pass
        except OSError:
            pass

    def _probe(self) -> None:
        """Send a little of the reply, which only a client that is there takes."""
        if self.has_begun:
            # Only streams are waited for once they have begun.
            self._probe_interval = min(self._probe_interval, MAX_PROBE_INTERVAL)
            self._send(COMMENT)
        elif self._num_sent < len(self._opening):
            self._num_sent += 1
            self._send(self._opening[self._num_sent - 1 : self._num_sent])

    def _is_at_end(self) -> bool:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except OSError as exc:
            raise ClientGone(f"the connection broke: {exc}") from exc

    def _send(self, data: bytes) -> None:
        try:
            self._wfile.write(data)
        except OSError as exc:
            raise ClientGone(f"the client reads no more: {exc}") from exc
