"""What the page is answered with."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ._feed import as_json


def answer(data: Any, status: int = 200) -> Response:
    """Data that JSON can express."""
    return Response(as_json(data), status, media_type="application/json")


def problem(status: int, message: str) -> Response:
    """Why something is not done."""
    return answer({"error": {"message": message}}, status)
