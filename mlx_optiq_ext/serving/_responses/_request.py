"""Reads the body of a Responses request."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from .._conversation import Conversation
from .._errors import bad_request
from .._fields import choice, missing, number, optional
from .._request import (
    MAX_TOKENS,
    Request,
    read_num_top_logprobs,
    read_stop,
    refuse,
    refuse_choices,
)
from .._store import ResponseStore
from .._structure import read_format, read_structure
from ._items import ItemReader, input_items, is_reference
from ._tools import ToolBox

Body = dict[str, Any]
Item = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
TRUNCATIONS = ("auto", "disabled")
ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


@dataclass
class ResponseRequest:
    """A request to Responses.

    Args:
        request: What it asks of mlx-lm.
        tool_box: Its tools.
        items: All that the reply is based on, earlier turns included, each with an id.
        echo: Fields of the request that the response object repeats.
        is_stored: Whether the response can be asked for later.
    """

    request: Request
    tool_box: ToolBox
    items: list[Item]
    echo: Body
    is_stored: bool


def read_request(body: Body, store: ResponseStore) -> ResponseRequest:
    """Translate a request.

    Args:
        body (dict): The request's JSON object.
        store (ResponseStore): Has the earlier responses that it may refer to.

    Raises:
        APIError: 400, with the first field that is at fault.
    """
    _check_supported(body)
    items = _read_items(body, store)
    conversation = Conversation()
    conversation.add_system(optional(body, "instructions", str, ""))
    reader = ItemReader(conversation)
    for index, item in enumerate(items):
        reader.read(item, f"input.{index}.")
    num_top_logprobs = read_num_top_logprobs(body)
    request = Request(
        messages=conversation.result(),
        model=optional(body, "model", str),
        body=body,
        is_streamed=optional(body, "stream", bool, False),
        max_tokens=_read_max_tokens(body),
        least_max_tokens=MAX_TOKENS,
        stop=read_stop(body, "stop") or read_stop(body, "stop_sequences"),
        gives_logprobs=LOGPROBS in optional(body, "include", list, [])
        or num_top_logprobs > 0,
        num_top_logprobs=num_top_logprobs,
    )
    tool_box = ToolBox(body)
    tool_box.choose(body, request)
    text = optional(body, "text", dict, {})
    read_format(text.get("format"), "text.format", request)
    read_format(body.get("response_format"), "response_format", request)
    read_structure(body, request)
    _read_reasoning(body, request)
    is_stored = optional(body, "store", bool, True)
    return ResponseRequest(request, tool_box, items, _echo(body), is_stored)


def _check_supported(body: Body) -> None:
    refuse(body, "background", "conversation", "prompt")
    refuse_choices(body)


def _read_max_tokens(body: Body) -> int | None:
    for name in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
        if (found := number(body, name, None, least=1, kind=int)) is not None:
            return found
    return None


def _read_items(body: Body, store: ResponseStore) -> list[Item]:
    previous = _read_previous(body, store)
    if body.get("input") is None:
        raise missing("input")
    items = [*previous, *input_items(body["input"])]
    if not items:
        raise bad_request("input: at least one item is required", param="input")
    return [_with_id(_resolved(item, items, store)) for item in items]


def _read_previous(body: Body, store: ResponseStore) -> list[Item]:
    previous_id = optional(body, "previous_response_id", str)
    if previous_id is None:
        return []
    stored = store.get(previous_id)
    if stored is None:
        raise bad_request(
            f"Previous response with id '{previous_id}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored.history


def _resolved(item: Item, items: list[Item], store: ResponseStore) -> Item:
    """The item that an ``item_reference`` stands for."""
    if not is_reference(item):
        return item
    item_id = item.get("id")
    for candidate in items:
        if candidate.get("id") == item_id and not is_reference(candidate):
            return candidate
    found = store.find_item(item_id) if isinstance(item_id, str) else None
    if found is None:
        raise bad_request(f"Item with id '{item_id}' not found.", param="input")
    return found


def _with_id(item: Item) -> Item:
    kind = item.get("type", "message")
    if item.get("id") is not None or kind not in ID_PREFIXES:
        return item
    return item | {"id": f"{ID_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind}


def _read_reasoning(body: Body, request: Request) -> None:
    reasoning = optional(body, "reasoning", dict, {})
    request.limit_thinking(number(reasoning, "max_tokens", None, least=0, kind=int))
    effort = optional(reasoning, "effort", str, path="reasoning.")
    if effort is not None:
        request.choose_effort(effort, "reasoning.effort")
    elif (effort := optional(body, "reasoning_effort", str)) is not None:
        request.choose_effort(effort, "reasoning_effort")


def _echo(body: Body) -> Body:
    reasoning = optional(body, "reasoning", dict, {})
    text = optional(body, "text", dict, {})
    return {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": optional(body, "metadata", dict, {}),
        "parallel_tool_calls": optional(body, "parallel_tool_calls", bool, True),
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {
            "effort": reasoning.get("effort"),
            "summary": reasoning.get("summary"),
        },
        "store": optional(body, "store", bool, True),
        "temperature": number(body, "temperature", None, least=0),
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": optional(body, "tool_choice", (str, dict), "auto"),
        "tools": optional(body, "tools", list, []),
        "top_p": number(body, "top_p", None, least=0, most=1),
        "truncation": choice(
            optional(body, "truncation", str, "disabled"), TRUNCATIONS, "truncation"
        ),
    }
