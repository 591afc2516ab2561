"""Replies as models write them, and how they are read."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mlx_optiq_ext.serving._events import Call, Event, Text, Thought, Usage
from mlx_optiq_ext.serving._reading import Reading, ReplyFormat, read_reply

# The formats of calls that are read while they are written.
STREAMED = ("json_tools", "qwen3_coder", "gemma4")


class Response(NamedTuple):
    text: str
    finish_reason: str | None = None
    token: int = 0
    logprob: float = 0.0
    top_tokens: Any = ()


def parser_of(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.tool_parsers.{name}")


def format_of(name: str) -> ReplyFormat:
    parser = parser_of(name)
    starts = [(parser.tool_call_start, "tool")]
    if name == "qwen3_coder":
        starts.append(("<function=", "tool"))
    transitions = {
        "normal": [("<think>", "reasoning"), *starts],
        "reasoning": [("</think>", "normal"), *starts],
    }
    return ReplyFormat(
        transitions, parser.tool_call_end, parser.parse_tool_call, "</think>"
    )


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("f"), tool("g")]


def read(
    pieces: Iterable[str],
    finish_reason: str = "stop",
    name: str = "json_tools",
    **options: Any,
) -> list[Event]:
    """The events of a reply, neighbours of one kind joined, without calls' pieces.

    Args:
        pieces (Iterable[str]): The text of each token.
        finish_reason (str): Of the last.
        name (str): The parser of mlx-lm for the format of calls.
        options: Of `Reading`.
    """
    return merged(raw_events(pieces, finish_reason, name, **options))


def raw_events(
    pieces: Iterable[str],
    finish_reason: str = "stop",
    name: str = "json_tools",
    usage: Usage | None = None,
    **options: Any,
) -> list[Event]:
    texts = [*pieces]
    responses = [Response(text) for text in texts[:-1]]
    responses.append(Response(texts[-1], finish_reason))
    reading = Reading(**{"format": format_of(name), "tools": TOOLS} | options)
    return [*read_reply(responses, reading, usage or Usage())]


def merged(events: Iterable[Event]) -> list[Event]:
    merged_events: list[Event] = []
    for event in events:
        last = merged_events[-1] if merged_events else None
        if isinstance(event, (Text, Thought)) and isinstance(last, type(event)):
            merged_events[-1] = type(event)(last.text + event.text)
        else:
            merged_events.append(event)
    return merged_events


def calls(events: Iterable[Event]) -> list[Call]:
    return [event for event in events if isinstance(event, Call)]


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)] or [""]


def cut_anywhere(text: str, dice: random.Random) -> list[str]:
    pieces, longest = [], dice.choice([1, 3, 8, 40])
    while text:
        size = dice.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces or [""]


def as_json(name: str, arguments: dict[str, Any]) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def as_xml(name: str, arguments: dict[str, Any]) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}"
        "\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def as_gemma(name: str, arguments: dict[str, Any]) -> str:
    def literal(value: Any) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, list):
            return f"[{','.join(map(literal, value))}]"
        if isinstance(value, dict):
            pairs = (f"{key}:{literal(item)}" for key, item in value.items())
            return "{" + ",".join(pairs) + "}"
        return json.dumps(value)

    return f"<|tool_call>call:{name}{literal(arguments)}<tool_call|>"


WRITERS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "json_tools": as_json,
    "qwen3_coder": as_xml,
    "gemma4": as_gemma,
}
