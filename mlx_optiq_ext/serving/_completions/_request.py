"""Reads the body of a completions request, and what chat completions share with it."""

from __future__ import annotations

from typing import Any

from .._errors import bad_request
from .._fields import checked, missing, number, optional
from .._request import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    Request,
    read_num_top_logprobs,
    read_stop,
    refuse,
)
from .._structure import read_format, read_structure

Body = dict[str, Any]

LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def read_completion_request(body: Body) -> Request:
    """Translate a request for the continuation of a text.

    Args:
        body (dict): The request's JSON object.

    Raises:
        APIError: 400, with the first field that is at fault.
    """
    refuse(body, "echo", "suffix")
    if number(body, "best_of", 1, kind=int) > 1:
        raise bad_request(
            "best_of: not supported here", "best_of", "unsupported_parameter"
        )
    request = Request("text", prompt=_read_prompt(body))
    read_common(body, request)
    logprobs = optional(body, "logprobs", (bool, int), False)
    if not isinstance(logprobs, bool):
        number(body, "logprobs", 0, least=0, most=MAX_TOP_LOGPROBS, kind=int)
        request.num_top_logprobs = max(logprobs, request.num_top_logprobs)
        logprobs = True
    request.gives_logprobs = logprobs or request.num_top_logprobs > 0
    return request


def read_common(body: Body, request: Request) -> None:
    """Read the fields that both APIs have.

    Raises:
        APIError: 400, with the first that is at fault.
    """
    options = optional(body, "stream_options", dict, {})
    optional(options, "include_usage", bool, path="stream_options.")
    request.body = body
    request.model = optional(body, "model", str)
    request.is_streamed = optional(body, "stream", bool, False)
    request.max_tokens = _read_max_tokens(body)
    request.stop = read_stop(body, "stop") or read_stop(body, "stop_sequences")
    request.num_choices = number(body, "n", 1, least=1, most=MAX_CHOICES, kind=int)
    request.num_top_logprobs = read_num_top_logprobs(body)
    request.gives_sources = optional(body, "token_sources", bool, False)
    # All that is generated is sent as it is, as mlx-lm does.
    request.keeps_space = True
    read_format(body.get("response_format"), "response_format", request)
    read_structure(body, request)


def _read_max_tokens(body: Body) -> int | None:
    for name in LENGTHS:
        if (found := number(body, name, None, least=1, kind=int)) is not None:
            return found
    return None


def _read_prompt(body: Body) -> str | list[int]:
    prompt = optional(body, "prompt", (str, list))
    if prompt is None:
        raise missing("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not _is_token(prompt[0]):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return prompt
    tokens = checked(prompt, list, "prompt")
    if not all(map(_is_token, tokens)):
        raise bad_request(
            "prompt: expected one text, or the ids of its tokens", param="prompt"
        )
    return tokens


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
