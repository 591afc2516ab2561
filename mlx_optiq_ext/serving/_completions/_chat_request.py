"""Reads the body of a chat completions request."""

from __future__ import annotations

from typing import Any

from .._conversation import (
    image_part,
    log_dropped_tools,
    pick_tools,
    read_arguments,
    text_part,
    without_billing_line,
)
from .._errors import bad_request
from .._fields import choice, objects, optional, required
from .._request import Request, refuse, refuse_format
from ._request import read_common

Body = dict[str, Any]
Message = dict[str, Any]
Tool = dict[str, Any]

# Where messages with images are taken from, and texts.
IMAGE_KINDS = ("image_url", "input_image", "image")
TEXT_KINDS = ("text", "input_text", "output_text")

TOOL_CHOICES = ("auto", "none", "required")


def read_chat_request(body: Body) -> Request:
    """Translate a request for the next message of a chat.

    Args:
        body (dict): The request's JSON object.

    Raises:
        APIError: 400, with the first field that is at fault.
    """
    _check_supported(body)
    request = Request(
        messages=_read_messages(body),
        role_mapping=optional(body, "role_mapping", dict),
    )
    read_common(body, request)
    optional(body, "chat_template_kwargs", dict)
    has_logprobs = optional(body, "logprobs", bool, False)
    request.gives_logprobs = has_logprobs or request.num_top_logprobs > 0
    _read_tools(body, request)
    _read_thinking(body, request)
    return request


def _check_supported(body: Body) -> None:
    refuse(body, "functions", "audio", "web_search_options")
    if optional(body, "modalities", list, ["text"]) != ["text"]:
        refuse(body, "modalities")
    text = optional(body, "text", dict, {})
    refuse_format(text.get("format"), "text.format")


def _read_messages(body: Body) -> list[Message]:
    messages = objects(required(body, "messages", list), "messages")
    if not messages:
        raise bad_request("messages: at least one is required", param="messages")
    return [_read_message(message, f"{path}.") for path, message in messages]


def _read_message(message: Message, path: str) -> Message:
    """A message as a template takes it, without fields that are null."""
    role = required(message, "role", str, path)
    content = _read_content(message, path)
    if role in ("system", "developer") and isinstance(content, str):
        content = without_billing_line(content)
    read = {name: value for name, value in message.items() if value is not None}
    read["content"] = content
    if isinstance(message.get("reasoning"), str):
        # Our replies have it by both names, templates know one.
        read.setdefault("reasoning_content", message["reasoning"])
    calls = optional(message, "tool_calls", list, [], path)
    if calls:
        read["tool_calls"] = [
            _read_call(call, f"{place}.")
            for place, call in objects(calls, f"{path}tool_calls")
        ]
    return read


def _read_content(message: Message, path: str) -> str | list[Any]:
    content = optional(message, "content", (str, list), "", path)
    if isinstance(content, str):
        return content
    return [
        _read_part(part, f"{place}.")
        for place, part in objects(content, f"{path}content")
    ]


def _read_part(part: Message, path: str) -> Message:
    kind = required(part, "type", str, path)
    if kind in TEXT_KINDS:
        return part | {"type": "text", "text": required(part, "text", str, path)}
    if kind == "refusal":
        return text_part(required(part, "refusal", str, path))
    if kind not in IMAGE_KINDS:
        raise bad_request(
            f"{path}type: {kind!r} is not supported here", param=f"{path}type"
        )
    source = part.get("image_url", part.get("image"))
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str):
        raise bad_request(f"{path}image_url: expected a URL", param=f"{path}image_url")
    return image_part(url)


def _read_call(call: Message, path: str) -> Message:
    function = required(call, "function", dict, path)
    place = f"{path}function."
    required(function, "name", str, place)
    arguments = optional(function, "arguments", (str, dict), path=place)
    return call | {"function": function | {"arguments": read_arguments(arguments)}}


def _read_tools(body: Body, request: Request) -> None:
    tools: list[Tool] = []
    dropped: list[str] = []
    for path, tool in objects(optional(body, "tools", list, []), "tools"):
        kind = optional(tool, "type", str, "function", f"{path}.")
        if kind == "function":
            function = required(tool, "function", dict, f"{path}.")
            required(function, "name", str, f"{path}.function.")
            tools.append(tool)
        else:
            dropped.append(kind)
    log_dropped_tools(dropped)
    mode, names = _read_choice(body)
    if names is not None:
        tools = pick_tools(tools, names, "tool_choice")
    request.choose_tools(mode, tools)
    request.one_call = not optional(body, "parallel_tool_calls", bool, True)


def _read_choice(body: Body) -> tuple[str, list[str] | None]:
    """How tools are to be used, and which; None for all of them."""
    selected = optional(body, "tool_choice", (str, dict), "auto")
    if isinstance(selected, str):
        return choice(selected, TOOL_CHOICES, "tool_choice"), None
    kind = optional(selected, "type", str, "function", "tool_choice.")
    if kind == "function":
        return "required", [_name_of(selected, "tool_choice.")]
    if kind != "allowed_tools":
        raise bad_request(
            f"tool_choice.type: {kind!r} is not supported here",
            param="tool_choice.type",
        )
    allowed = required(selected, kind, dict, "tool_choice.")
    place = f"tool_choice.{kind}."
    mode = choice(
        required(allowed, "mode", str, place), ("auto", "required"), f"{place}mode"
    )
    listed = objects(required(allowed, "tools", list, place), f"{place}tools")
    return mode, [_name_of(tool, f"{path}.") for path, tool in listed]


def _name_of(selected: Body, path: str) -> str:
    function = required(selected, "function", dict, path)
    return required(function, "name", str, f"{path}function.")


def _read_thinking(body: Body, request: Request) -> None:
    """The several ways in which clients ask for thinking, the plainest last."""
    if (thinking := optional(body, "thinking", dict)) is not None:
        kind = required(thinking, "type", str, "thinking.")
        request.has_thinking = kind != "disabled" and not request.must_call
    reasoning = optional(body, "reasoning", dict, {})
    if (effort := optional(reasoning, "effort", str, path="reasoning.")) is not None:
        request.choose_effort(effort, "reasoning.effort")
    if (effort := optional(body, "reasoning_effort", str)) is not None:
        request.choose_effort(effort, "reasoning_effort")
    if not request.must_call and "enable_thinking" in body:
        request.has_thinking = optional(body, "enable_thinking", bool)
