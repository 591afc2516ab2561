"""Turns of a conversation and tools, in the words that a chat template takes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from ._errors import bad_request

Message = dict[str, Any]
Part = dict[str, Any]


# Claude Code's first line, with a value that is new for every request: kept, it would
# spoil the prompt cache for everything after it.
BILLING_HEADER = "x-anthropic-billing-header:"


class Conversation:
    """Collects turns, of which neighbours of one role merge.

    System text goes to the top if it comes first. What comes later stays where it is,
    for the sake of its meaning and of the prompt cache: as the user's, because most
    templates take system text at the top only.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._system: list[str] = []

    def add_system(self, text: str) -> None:
        text = without_billing_line(text)
        if text and self.messages:
            self.add_user(text)
        elif text:
            self._system.append(text)

    def add_user(self, content: str | list[Part]) -> None:
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "user":
            last["content"] = _joined(last["content"], content)
        else:
            self.messages.append({"role": "user", "content": content})

    def add_tool_result(self, call_id: str, text: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def add_assistant(self, text: str = "", reasoning: str = "") -> None:
        turn = self._assistant_turn()
        turn["content"] += text
        if reasoning:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + reasoning

    def add_call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        function = {"name": name, "arguments": to_json(arguments)}
        call = {"id": call_id, "type": "function", "function": function}
        self._assistant_turn().setdefault("tool_calls", []).append(call)

    def result(self) -> list[Message]:
        """The messages, at most one of them a system message, and that the first."""
        if not self._system:
            return self.messages
        system = {"role": "system", "content": "\n\n".join(self._system)}
        return [system, *self.messages]

    def _assistant_turn(self) -> Message:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def without_billing_line(text: str) -> str:
    """A system prompt without the line that is for billing only."""
    return text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text


def read_arguments(value: str | dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of an earlier call, which a template wants as an object.

    What is no object, for the model wrote something else or was cut off, is passed on
    as a single argument, so that the model sees it and the conversation can go on.
    """
    if isinstance(value, dict):
        return value
    arguments: Any = value or "{}"
    # Some clients encode what is encoded already.
    for _ in range(2):
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, dict) else {"arguments": value}


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def image_part(url: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url}}


def simplified(parts: list[Part]) -> str | list[Part]:
    """One string if there is nothing but text: that is what any template takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def function_tool(
    name: str, description: str, parameters: dict[str, Any]
) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def tool_name(tool: dict[str, Any]) -> str:
    return tool["function"]["name"]


def pick_tools(
    tools: list[dict[str, Any]], names: Iterable[str], path: str
) -> list[dict[str, Any]]:
    """The tools of these names.

    Raises:
        APIError: 400, if there is no tool of one of the names.
    """
    wanted = set(names)
    picked = [tool for tool in tools if tool_name(tool) in wanted]
    if unknown := wanted - set(map(tool_name, picked)):
        raise bad_request(
            f"{path}: there is no tool named {', '.join(sorted(unknown))}", param=path
        )
    return picked


def log_dropped_tools(kinds: list[str]) -> None:
    if kinds:
        logging.info("Tools that run on a vendor's server are left out: %s", kinds)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined(first: str | list[Part], second: str | list[Part]) -> str | list[Part]:
    return simplified([*_as_parts(first), *_as_parts(second)])


def _as_parts(content: str | list[Part]) -> list[Part]:
    return [text_part(content)] if isinstance(content, str) else content
