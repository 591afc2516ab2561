"""What both APIs ask of mlx-lm: a chat, and how to sample its next turn."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ._errors import bad_request

Message = dict[str, Any]
Part = dict[str, Any]


@dataclass
class Chat:
    """A request, in the words of mlx-lm's chat completions.

    Args:
        model: The id that the client uses.
        messages: As a chat template takes them.
        tools: As a chat template takes them, None if there are none.
        must_call: The reply has to be a call of a tool.
        one_call: The reply is over after its first call.
        prefill: How the reply has to begin.
        max_tokens: None for the server's default, 0 to fill the cache only.
        stop: Stop sequences.
        template: Further arguments of the chat template.
        has_thinking: Whether thinking is asked for, None if that is left open.
        thinks_by_default: What an open question means, unless the server's own
            template arguments decide it.
        body: The request's own body, for the sampling parameters.
    """

    model: str | None
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    must_call: bool = False
    one_call: bool = False
    prefill: str = ""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    template: dict[str, Any] = field(default_factory=dict)
    has_thinking: bool | None = None
    thinks_by_default: bool = True
    body: dict[str, Any] = field(default_factory=dict)


class Conversation:
    """Collects turns: neighbours of one role merge, system text goes to the top."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._system: list[str] = []

    def add_system(self, text: str) -> None:
        if text:
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
