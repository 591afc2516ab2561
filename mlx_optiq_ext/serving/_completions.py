"""Checks the bodies of mlx-lm's own routes for what it trips over."""

from __future__ import annotations

import json
from typing import Any

from ._errors import bad_request
from ._exchange import parse_object
from ._fields import checked, missing, objects, optional, required

Body = dict[str, Any]


# Fields in which mlx-lm takes a truth value for a number, until it computes with it.
INTEGERS = (
    "frequency_context_size",
    "max_completion_tokens",
    "max_tokens",
    "num_draft_tokens",
    "presence_context_size",
    "repetition_context_size",
    "seed",
    "top_k",
    "top_logprobs",
)


def check_completion(path: str, data: bytes) -> bytes:
    """Refuse a body that mlx-lm would not answer with an error of its own.

    Args:
        path (str): The route.
        data (bytes): The body.

    Returns:
        bytes: The body in a form that mlx-lm understands.

    Raises:
        APIError: 400, with the first field that is at fault.
    """
    body = parse_object(data)
    _check_options(body)
    if path.endswith("/chat/completions"):
        _check_messages(body)
    elif body.get("prompt") is None:
        raise missing("prompt")
    else:
        required(body, "prompt", str)
    options = optional(body, "stream_options", dict)
    if options is None or "include_usage" in options:
        return data
    # mlx-lm looks for it in any case, in the middle of a stream.
    return json.dumps(body | {"stream_options": {"include_usage": False}}).encode()


def _check_options(body: Body) -> None:
    stop = optional(body, "stop", (str, list), [])
    for index, word in enumerate(stop if isinstance(stop, list) else []):
        if not checked(word, str, f"stop.{index}"):
            raise bad_request(f"stop.{index}: must not be empty", param="stop")
    for name in ("stream_options", "chat_template_kwargs", "role_mapping"):
        optional(body, name, dict)
    optional(body.get("stream_options") or {}, "include_usage", bool)
    for name in INTEGERS:
        if isinstance(body.get(name), bool):
            raise bad_request(f"{name}: expected an integer, got a boolean", name)
    optional(body, "draft_model", str)


def _check_messages(body: Body) -> None:
    messages = objects(required(body, "messages", list), "messages")
    if not messages:
        raise bad_request("messages: at least one is required", param="messages")
    for path, message in messages:
        required(message, "role", str, f"{path}.")
        content = optional(message, "content", (str, list), "", f"{path}.")
        if isinstance(content, list):
            _check_parts(content, f"{path}.content")
    objects(optional(body, "tools", list, []), "tools")


def _check_parts(parts: list[Any], path: str) -> None:
    for place, part in objects(parts, path):
        if required(part, "type", str, f"{place}.") == "text":
            required(part, "text", str, f"{place}.")
