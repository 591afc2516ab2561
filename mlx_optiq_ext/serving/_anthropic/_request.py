"""Reads the body of a Messages request."""

from __future__ import annotations

from typing import Any

from .._conversation import (
    Conversation,
    function_tool,
    log_dropped_tools,
    pick_tools,
)
from .._errors import bad_request
from .._fields import (
    choice,
    missing,
    number,
    objects,
    optional,
    required,
)
from .._request import (
    EFFORT_TOKENS,
    MAX_TOKENS,
    Request,
    read_stop,
    refuse,
    refuse_choices,
)
from .._structure import read_format, read_structure
from ._content import read_message, system_text

Body = dict[str, Any]

EFFORTS = ("low", "medium", "high", "xhigh", "max")
TOOL_CHOICES = ("auto", "any", "tool", "none")
THINKING = ("enabled", "adaptive", "disabled", "between_tools")


def read_request(body: Body, *, counts_only: bool = False) -> Request:
    """Translate a request.

    Args:
        body (dict): The request's JSON object.
        counts_only (bool): It is one of ``count_tokens``.

    Raises:
        APIError: 400, with the first field that is at fault.
    """
    model = required(body, "model", str)
    messages = required(body, "messages", list)
    if not counts_only and body.get("max_tokens") is None:
        raise missing("max_tokens")
    _check_supported(body)
    conversation, prefill = _read_messages(body, messages)
    request = Request(
        messages=conversation.result(),
        model=model,
        body=body,
        is_streamed=optional(body, "stream", bool, False),
        prefill=prefill,
        max_tokens=number(body, "max_tokens", None, least=0, kind=int),
        least_max_tokens=MAX_TOKENS,
        stop=_read_stop(body),
        thinks_by_default=False,
        counts_only=counts_only,
    )
    _read_tools(body, request)
    _read_thinking(body, request)
    _read_output_config(body, request)
    return request


def _check_supported(body: Body) -> None:
    refuse(body, "logprobs", "top_logprobs")
    refuse_choices(body)


def _read_messages(body: Body, messages: list[Any]) -> tuple[Conversation, str]:
    conversation = Conversation()
    system = optional(body, "system", (str, list), "")
    conversation.add_system(system_text(system, "system"))
    for path, message in objects(messages, "messages"):
        read_message(conversation, message, path)
    if not conversation.messages:
        raise bad_request(
            "messages: at least one message is required", param="messages"
        )
    return conversation, _take_prefill(conversation)


def _take_prefill(conversation: Conversation) -> str:
    last = conversation.messages[-1]
    if last["role"] != "assistant":
        return ""
    if "tool_calls" in last:
        raise bad_request(
            "messages: the last message has tool_use blocks without tool_result blocks "
            "after them",
            param="messages",
        )
    if len(conversation.messages) == 1:
        raise bad_request(
            "messages: a user message has to come first", param="messages"
        )
    conversation.messages.pop()
    return last["content"]


def _read_stop(body: Body) -> tuple[str, ...]:
    optional(body, "stop_sequences", list)
    return read_stop(body, "stop_sequences") or read_stop(body, "stop")


def _read_tools(body: Body, request: Request) -> None:
    tools, dropped, strict = [], [], []
    for path, tool in objects(optional(body, "tools", list, []), "tools"):
        if optional(tool, "type", str, "custom", f"{path}.") == "custom":
            tools.append(_read_tool(tool, f"{path}."))
            if optional(tool, "strict", bool, False, f"{path}."):
                strict.append(tool["name"])
        else:
            dropped.append(tool["type"])
    log_dropped_tools(dropped)
    tool_choice = optional(body, "tool_choice", dict, {"type": "auto"})
    kind = required(tool_choice, "type", str, "tool_choice.")
    choice(kind, TOOL_CHOICES, "tool_choice.type")
    request.one_call = optional(
        tool_choice, "disable_parallel_tool_use", bool, False, "tool_choice."
    )
    if kind == "tool":
        name = required(tool_choice, "name", str, "tool_choice.")
        tools = pick_tools(tools, [name], "tool_choice.name")
    mode = {"any": "required", "tool": "required"}.get(kind, kind)
    request.choose_tools(mode, tools, strict)


def _read_tool(tool: Body, path: str) -> dict[str, Any]:
    return function_tool(
        required(tool, "name", str, path),
        optional(tool, "description", str, "", path),
        required(tool, "input_schema", dict, path),
    )


def _read_thinking(body: Body, request: Request) -> None:
    thinking = optional(body, "thinking", dict, {})
    kind = optional(thinking, "type", str, path="thinking.")
    if kind is None and thinking:
        raise missing("thinking.type")
    request.limit_thinking(number(thinking, "budget_tokens", None, least=0, kind=int))
    if kind is not None:
        choice(kind, THINKING, "thinking.type")
        if kind == "enabled":
            _check_thinking(request)
        request.has_thinking = kind != "disabled"
    if request.prefill or request.must_call:
        request.has_thinking = False


def _check_thinking(request: Request) -> None:
    if request.prefill:
        raise bad_request(
            "messages: the last message must not be the assistant's when thinking is "
            "enabled",
            param="messages",
        )
    if request.must_call:
        raise bad_request(
            "tool_choice: a call cannot be forced when thinking is enabled",
            param="tool_choice",
        )


def _read_output_config(body: Body, request: Request) -> None:
    config = optional(body, "output_config", dict, {})
    read_format(config.get("format"), "output_config.format", request)
    for name in ("output_format", "response_format"):
        read_format(body.get(name), name, request)
    read_structure(body, request)
    effort = optional(config, "effort", str, path="output_config.")
    if effort is not None:
        request.template["reasoning_effort"] = choice(
            effort, EFFORTS, "output_config.effort"
        )
        request.limit_thinking(EFFORT_TOKENS.get(effort))
