"""What went wrong with a request, and how each API says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# Raised while a request is read, templated or tokenised, these are the caller's doing.
CALLER_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, AssertionError)


# The note on an exception that a model could not be loaded for.
LOADING = "while a model was loaded"


class APIError(Exception):
    """An error that a client is told about.

    Args:
        status (int): HTTP status.
        message (str): What was found and what was expected.
        param (str, optional): The field that is at fault.
        code (str, optional): OpenAI's machine-readable reason.
        headers (Mapping, optional): Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


class ClientGone(Exception):
    """The client left before the reply was complete.

    No other failure of a connection raises this: one to another host, for an image or a
    model, says nothing about the client.
    """


def bad_request(
    message: str, param: str | None = None, code: str | None = None
) -> APIError:
    return APIError(400, message, param=param, code=code)


def context_overflow(num_tokens: int, max_tokens: int) -> APIError:
    """The error by which agents know that they have to shorten a conversation."""
    return bad_request(
        f"prompt is too long: {num_tokens} tokens > {max_tokens} maximum",
        param="input",
        code="context_length_exceeded",
    )


def before_generation(exc: BaseException) -> APIError:
    """What an exception means that came before the first token."""
    if isinstance(exc, APIError):
        return exc
    if _is_missing_model(exc):
        return APIError(
            404, f"The model could not be loaded: {exc}", code="model_not_found"
        )
    if isinstance(exc, CALLER_MISTAKES) or is_template_error(exc):
        return bad_request(_describe(exc))
    return during_generation(exc)


def during_generation(exc: BaseException) -> APIError:
    """What an exception means that came after the request was accepted."""
    if isinstance(exc, APIError):
        return exc
    return APIError(500, f"Generation failed: {_describe(exc)}", code="server_error")


def anthropic_body(error: APIError, request_id: str) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status)
    if kind is None:
        kind = "api_error" if error.status >= 500 else "invalid_request_error"
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


def openai_body(error: APIError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def _describe(exc: BaseException) -> str:
    text = str(exc)
    # The text of a KeyError is no more than the key.
    if not text or isinstance(exc, LookupError):
        return f"{type(exc).__name__}: {text}".rstrip(": ")
    return text


def _is_missing_model(exc: BaseException) -> bool:
    # Files and hosts of other kinds fail in the same way as those of models.
    if LOADING not in getattr(exc, "__notes__", ()):
        return False
    return isinstance(exc, OSError) or type(exc).__module__.startswith(
        "huggingface_hub"
    )


def is_template_error(exc: BaseException) -> bool:
    return type(exc).__module__.partition(".")[0] == "jinja2"
