"""Reads the input items of a Responses request."""

from __future__ import annotations

from typing import Any

from .._conversation import (
    Conversation,
    Part,
    image_part,
    read_arguments,
    simplified,
    text_part,
)
from .._errors import bad_request
from .._fields import checked, choice, objects, optional, required
from ._tools import flat_name

Item = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")


# Items of what ran on the vendor's own servers, which nobody else can read.
VENDOR_ITEMS = ("compaction", "compaction_summary", "compaction_trigger")
VENDOR_STARTS = ("mcp_", "tool_search_")
VENDOR_ENDINGS = ("_call", "_call_output")


class ItemReader:
    """Adds items to a conversation."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation

    def read(self, item: Item, path: str) -> None:
        """Add an item.

        Raises:
            APIError: 400, if it is malformed or of an unknown type.
        """
        kind = optional(item, "type", str, "message", path)
        if kind == "message":
            self._message(item, path)
        elif kind == "reasoning":
            # It is part of the assistant's turn, even if the rest was never written.
            if text := reasoning_text(item, path):
                self._conversation.add_assistant(reasoning=text)
        elif kind in CALLS:
            self._call(item, kind, path)
        elif kind in OUTPUTS:
            self._output(item, path)
        elif not is_ignored(kind):
            raise bad_request(
                f"{path}type: {kind!r} is not supported here", param=f"{path}type"
            )

    def _message(self, item: Item, path: str) -> None:
        role = choice(required(item, "role", str, path), ROLES, f"{path}role")
        content = required(item, "content", (str, list), path)
        parts = read_parts(content, f"{path}content")
        if role == "user":
            self._conversation.add_user(simplified(parts))
        elif role == "assistant":
            self._conversation.add_assistant(_only_text(parts))
        else:
            self._conversation.add_system(_only_text(parts))

    def _call(self, item: Item, kind: str, path: str) -> None:
        if kind == "custom_tool_call":
            arguments = {"input": required(item, "input", str, path)}
        else:
            arguments = read_arguments(required(item, "arguments", str, path))
        namespace = optional(item, "namespace", str, path=path)
        name = flat_name(required(item, "name", str, path), namespace)
        call_id = required(item, "call_id", str, path)
        self._conversation.add_call(call_id, name, arguments)

    def _output(self, item: Item, path: str) -> None:
        output = required(item, "output", (str, list), path)
        parts = read_parts(output, f"{path}output")
        call_id = required(item, "call_id", str, path)
        self._conversation.add_tool_result(call_id, _only_text(parts))
        if images := [part for part in parts if part["type"] != "text"]:
            self._conversation.add_user(images)


def is_ignored(kind: str) -> bool:
    """Whether items of a kind mean something to their vendor only."""
    return (
        kind in VENDOR_ITEMS
        or kind.startswith(VENDOR_STARTS)
        or kind.endswith(VENDOR_ENDINGS)
    )


def reasoning_text(item: Item, path: str) -> str:
    """The raw text of a thought, its summary if that is all there is."""
    for name in ("content", "summary"):
        parts = read_parts(optional(item, name, list, [], path), f"{path}{name}")
        if text := _only_text(parts):
            return text
    return ""


def read_parts(content: str | list[Any], path: str) -> list[Part]:
    if isinstance(content, str):
        return [text_part(content)]
    return [_read_part(part, f"{place}.") for place, part in objects(content, path)]


def _read_part(part: Item, path: str) -> Part:
    kind = required(part, "type", str, path)
    if kind in TEXTS:
        return text_part(required(part, "text", str, path))
    if kind == "refusal":
        return text_part(required(part, "refusal", str, path))
    if kind == "input_image" and part.get("file_id") is None:
        return image_part(required(part, "image_url", str, path))
    raise bad_request(
        f"{path}type: {kind!r} is not supported here", param=f"{path}type"
    )


def _only_text(parts: list[Part]) -> str:
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def input_items(value: Any) -> list[Item]:
    """The input of a request as a list of items."""
    if isinstance(value, str):
        content = [{"type": "input_text", "text": value}]
        return [{"type": "message", "role": "user", "content": content}]
    items = objects(checked(value, list, "input"), "input")
    for path, item in items:
        optional(item, "type", str, path=f"{path}.")
        optional(item, "id", str, path=f"{path}.")
    return [item for _, item in items]


def is_reference(item: Item) -> bool:
    return item.get("type") == "item_reference" or set(item) == {"id"}


def page(items: list[Item], query: dict[str, list[str]]) -> Item:
    """One page of a list of items, in the form of the route ``input_items``.

    Args:
        items (list[dict]): All of them, the oldest first.
        query (dict): ``limit``, ``order`` and ``after`` of the query.

    Raises:
        APIError: 400, if one of them is malformed.
    """
    values = {name: texts[-1] for name, texts in query.items()}
    limit = values.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:4]) <= 100:
        raise bad_request(f"limit: {limit!r} is not between 1 and 100", param="limit")
    order = choice(values.get("order", "desc"), ("asc", "desc"), "order")
    ordered = items if order == "asc" else items[::-1]
    if "after" in values:
        ids = [item.get("id") for item in ordered]
        if values["after"] not in ids:
            raise bad_request(f"after: no item {values['after']!r}", param="after")
        ordered = ordered[ids.index(values["after"]) + 1 :]
    data = ordered[: int(limit)]
    return {
        "object": "list",
        "data": [_listed(item) for item in data],
        "first_id": data[0].get("id") if data else None,
        "last_id": data[-1].get("id") if data else None,
        "has_more": len(ordered) > len(data),
    }


def _listed(item: Item) -> Item:
    content = item.get("content")
    if item.get("type") != "message" or not isinstance(content, str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return item | {"content": [{"type": kind, "text": content}]}
