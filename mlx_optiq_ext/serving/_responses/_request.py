"""Reads the body of a Responses request."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from .._chat import Chat, Conversation
from .._errors import APIError, bad_request
from .._fields import checked, choice, missing, number, optional
from .._store import ResponseStore
from ._items import ItemReader, input_items, is_reference
from ._tools import ToolBox

Body = dict[str, Any]
Item = dict[str, Any]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
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
        chat: What it asks of mlx-lm.
        tool_box: Its tools.
        items: All that the reply is based on, earlier turns included, each with an id.
        echo: Fields of the request that the response object repeats.
        is_stored: Whether the response can be asked for later.
    """

    chat: Chat
    tool_box: ToolBox
    items: list[Item]
    echo: Body
    is_stored: bool


def read_request(body: Body, store: ResponseStore) -> ResponseRequest:
    """Translate a request into a chat.

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
    chat = Chat(
        optional(body, "model", str),
        conversation.result(),
        max_tokens=number(body, "max_output_tokens", None, least=1, kind=int),
        stop=_read_stop(body),
        body=body,
    )
    tool_box = ToolBox(body)
    tool_box.choose(body, chat)
    _read_reasoning(body, chat)
    is_stored = optional(body, "store", bool, True)
    return ResponseRequest(chat, tool_box, items, _echo(body), is_stored)


def _check_supported(body: Body) -> None:
    if optional(body, "background", bool, False):
        raise _unsupported("background")
    if body.get("conversation") is not None:
        raise _unsupported("conversation")
    if body.get("prompt") is not None:
        raise _unsupported("prompt")
    layout = optional(optional(body, "text", dict, {}), "format", dict, {}, "text.")
    if layout.get("type", "text") != "text":
        raise _unsupported("text.format")


def _unsupported(name: str) -> APIError:
    return bad_request(f"{name}: not supported here", name, "unsupported_parameter")


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


def _read_stop(body: Body) -> tuple[str, ...]:
    stop = optional(body, "stop", (str, list), [])
    sequences = [stop] if isinstance(stop, str) else stop
    return tuple(
        checked(sequence, str, f"stop.{index}")
        for index, sequence in enumerate(sequences)
        if sequence != ""
    )


def _read_reasoning(body: Body, chat: Chat) -> None:
    reasoning = optional(body, "reasoning", dict, {})
    effort = optional(reasoning, "effort", str, path="reasoning.")
    if effort is not None:
        choice(effort, EFFORTS, "reasoning.effort")
        chat.has_thinking = effort not in ("none", "minimal")
        chat.template["reasoning_effort"] = effort
    if chat.must_call:
        # A call is forced by its first token, which leaves no room for a thought.
        chat.has_thinking = False


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
