"""Reads the body of a Messages request."""

from __future__ import annotations

from typing import Any

from .._chat import (
    Chat,
    Conversation,
    function_tool,
    log_dropped_tools,
    pick_tools,
)
from .._errors import bad_request
from .._fields import (
    checked,
    choice,
    missing,
    number,
    objects,
    optional,
    required,
)
from ._content import read_message, system_text

Body = dict[str, Any]

EFFORTS = ("low", "medium", "high", "xhigh", "max")
TOOL_CHOICES = ("auto", "any", "tool", "none")
THINKING = ("enabled", "adaptive", "disabled", "between_tools")


def read_request(body: Body, *, counts_only: bool = False) -> Chat:
    """Translate a request into a chat.

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
    conversation, prefill = _read_messages(body, messages)
    chat = Chat(
        model,
        conversation.result(),
        prefill=prefill,
        max_tokens=number(body, "max_tokens", None, least=0, kind=int),
        stop=_read_stop(body),
        thinks_by_default=False,
        body=body,
    )
    _read_tools(body, chat)
    _read_thinking(body, chat)
    _read_output_config(body, chat)
    return chat


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
    sequences = optional(body, "stop_sequences", list, [])
    for index, sequence in enumerate(sequences):
        path = f"stop_sequences.{index}"
        if not checked(sequence, str, path):
            raise bad_request(f"{path}: must not be empty", param=path)
    return tuple(sequences)


def _read_tools(body: Body, chat: Chat) -> None:
    tools, dropped = [], []
    for path, tool in objects(optional(body, "tools", list, []), "tools"):
        if optional(tool, "type", str, "custom", f"{path}.") == "custom":
            tools.append(_read_tool(tool, f"{path}."))
        else:
            dropped.append(tool["type"])
    log_dropped_tools(dropped)
    tool_choice = optional(body, "tool_choice", dict, {"type": "auto"})
    kind = required(tool_choice, "type", str, "tool_choice.")
    choice(kind, TOOL_CHOICES, "tool_choice.type")
    chat.one_call = optional(
        tool_choice, "disable_parallel_tool_use", bool, False, "tool_choice."
    )
    if kind == "tool":
        name = required(tool_choice, "name", str, "tool_choice.")
        tools = pick_tools(tools, [name], "tool_choice.name")
    chat.must_call = kind in ("any", "tool")
    if chat.must_call and not tools:
        raise bad_request(
            f"tool_choice: {kind!r} needs a tool to call", param="tool_choice"
        )
    chat.tools = tools if kind != "none" and tools else None


def _read_tool(tool: Body, path: str) -> dict[str, Any]:
    return function_tool(
        required(tool, "name", str, path),
        optional(tool, "description", str, "", path),
        required(tool, "input_schema", dict, path),
    )


def _read_thinking(body: Body, chat: Chat) -> None:
    thinking = optional(body, "thinking", dict, {})
    kind = optional(thinking, "type", str, path="thinking.")
    if kind is None and thinking:
        raise missing("thinking.type")
    if kind is not None:
        choice(kind, THINKING, "thinking.type")
        chat.has_thinking = kind != "disabled"
    number(thinking, "budget_tokens", None, least=0, kind=int)
    if kind == "enabled":
        _check_thinking(chat)
    if chat.prefill or chat.must_call:
        chat.has_thinking = False


def _check_thinking(chat: Chat) -> None:
    if chat.prefill:
        raise bad_request(
            "messages: the last message must not be the assistant's when thinking is "
            "enabled",
            param="messages",
        )
    if chat.must_call:
        raise bad_request(
            "tool_choice: a call cannot be forced when thinking is enabled",
            param="tool_choice",
        )


def _read_output_config(body: Body, chat: Chat) -> None:
    config = optional(body, "output_config", dict, {})
    effort = optional(config, "effort", str, path="output_config.")
    if effort is not None:
        chat.template["reasoning_effort"] = choice(
            effort, EFFORTS, "output_config.effort"
        )
    if config.get("format") is not None or body.get("output_format") is not None:
        raise bad_request(
            "output_config.format: structured output is not supported",
            param="output_config.format",
        )
