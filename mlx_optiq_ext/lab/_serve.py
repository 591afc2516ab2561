"""Listens, and tells where."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import Callable

import uvicorn

from ._app import make_app
from ._guard import Guard
from ._lab import Lab
from ._options import LabOptions

SECONDS_TO_LEAVE = 1  # for pages that listen when the Lab is closed


def serve(options: LabOptions, announce: Callable[[str], None]) -> None:
    """Serve the Lab until it is interrupted."""
    listener = _listen(options.host, options.port)
    port: int = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)
    app = Guard(make_app(Lab(options)), token, options.host, port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}/?token={token}"
    announce(url)
    if options.opens_browser:
        webbrowser.open(url)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_LEAVE
    )
    uvicorn.Server(config).run([listener])


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
