"""Answers to what is no HTTP request."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from ._errors import APIError, openai_body


def send_malformed(handler: Any, status: int, message: str | None) -> None:
    """Answer with an error before there is a path or a header to go by."""
    error = APIError(status, message or HTTPStatus(status).phrase)
    data = json.dumps(openai_body(error)).encode()
    # Until a version is read it counts as 0.9, which has no status line.
    handler.request_version = "HTTP/1.0"
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    handler.close_connection = True
