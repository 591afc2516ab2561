"""Listens, and tells where."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn

from ._app import make_app
from ._guard import Guard
from ._lab import Lab
from ._options import LabOptions

SECONDS_TO_LEAVE = 10  # for replies that are streamed when the Lab is closed


def serve(options: LabOptions, announce: Callable[[str], None]) -> None:
    """Serve the Lab until it is interrupted."""
    listener = _listen(options.host, options.port)
    port: int = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)
    lab = Lab(options)
    app = Guard(make_app(lab), token, options.host, port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}/?token={token}"
    announce(url)
    if options.opens_browser:
        webbrowser.open(url)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_LEAVE
    )
    _Server(config, lab).run([listener])


class _Server(uvicorn.Server):
    """Lets pages that listen go when it is told to end."""

    def __init__(self, config: uvicorn.Config, lab: Lab):
        super().__init__(config)
        self._lab = lab

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._lab.leave()


def _listen(host: str, port: int) -> socket.socket:
    if not _is_loopback(host):
        raise ValueError(
            f"the Lab listens on this machine only, expected a loopback address such "
            f"as 127.0.0.1, got {host}; from elsewhere reach it through ssh -L"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} of {host} cannot be used: {error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
