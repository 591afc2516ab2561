"""Who may use the server: the key, and the web pages that a browser may ask for."""

from __future__ import annotations

import hmac
import os
from typing import Any

from ._errors import APIError

# Browsers take these names only when they are spelled out, not for an asterisk.
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization, Content-Type, x-api-key",
}


def check_origin(headers: Any, allowed_origins: list[str]) -> None:
    """Refuse what a browser sends for a web page that may not use the server.

    A missing header in the answer keeps a page from reading it, but by then the work is
    done: any page could have made the server fetch or generate something.

    Args:
        headers (Message): The headers of the request.
        allowed_origins (list[str]): The command line's list; "*" allows every origin.

    Raises:
        APIError: 403.
    """
    if "*" in allowed_origins:
        return
    for origin in headers.get_all("Origin", ()):
        if origin not in allowed_origins:
            raise APIError(
                403,
                f"Origin {origin!r} is not one of --allowed-origins",
                code="origin_not_allowed",
            )


def check_key(headers: Any, expected: str | None) -> None:
    """Refuse a request without the server's key.

    Args:
        headers (Message): The headers of the request.
        expected (str, optional): The key, None if the server has none.

    Raises:
        APIError: 401, if the server has a key and the request has not.
    """
    if expected is None:
        return
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    found = [bearer.strip() if scheme.lower() == "bearer" else ""]
    found.append(headers.get("x-api-key", ""))
    # Headers are bytes, which http.server decodes as Latin-1.
    keys = [key.encode("latin-1", "replace") for key in found]
    matches = [hmac.compare_digest(key, os.fsencode(expected)) for key in keys]
    if not any(matches):
        raise APIError(
            401,
            "the API key is missing or wrong",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def cors_headers(headers: Any, allowed_origins: list[str]) -> dict[str, str]:
    """The headers that let a browser hand a reply to the page that asked for it."""
    if "*" in allowed_origins:
        return {"Access-Control-Allow-Origin": "*"}
    origin = headers.get("Origin")
    if origin in allowed_origins:
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    return {}
