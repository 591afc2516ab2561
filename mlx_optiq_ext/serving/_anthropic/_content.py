"""Reads the turns of a Messages request and the blocks in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._conversation import (
    Conversation,
    Part,
    image_part,
    simplified,
    text_part,
    without_billing_line,
)
from .._errors import bad_request
from .._fields import choice, objects, optional, required

Block = dict[str, Any]

# "ctx" and "msg" are what Claude Code calls context that it adds by itself.
ROLES = ("user", "assistant", "system", "ctx", "msg")


def system_text(system: str | list[Any], path: str) -> str:
    """The text of a system prompt, without the line that is for billing only."""
    if isinstance(system, str):
        return system
    texts = [
        without_billing_line(required(block, "text", str, f"{place}."))
        for place, block in objects(system, path)
    ]
    return "\n\n".join(filter(None, texts))


def read_message(conversation: Conversation, message: Block, path: str) -> None:
    """Add a message to a conversation.

    Raises:
        APIError: 400, if its role, its content or a block is not understood.
    """
    role = choice(required(message, "role", str, f"{path}."), ROLES, f"{path}.role")
    content = required(message, "content", (str, list), f"{path}.")
    place = f"{path}.content"
    if role == "system":
        conversation.add_system(system_text(content, place))
    else:
        blocks = [text_part(content)] if isinstance(content, str) else content
        _add_blocks(conversation, role, blocks, place)


def _add_blocks(
    conversation: Conversation, role: str, content: list[Any], path: str
) -> None:
    blocks = objects(content, path)
    if role == "assistant":
        conversation.add_assistant()
        for place, block in blocks:
            _add_assistant_block(conversation, block, f"{place}.")
    else:
        _add_user_blocks(conversation, blocks)


def _add_assistant_block(conversation: Conversation, block: Block, path: str) -> None:
    kind = required(block, "type", str, path)
    if kind == "text":
        conversation.add_assistant(required(block, "text", str, path))
    elif kind == "thinking":
        conversation.add_assistant(reasoning=required(block, "thinking", str, path))
    elif kind == "tool_use":
        conversation.add_call(
            required(block, "id", str, path),
            required(block, "name", str, path),
            optional(block, "input", dict, {}, path),
        )
    elif not is_ignored(kind):
        raise _unknown(kind, path)


def _add_user_blocks(
    conversation: Conversation, blocks: list[tuple[str, Block]]
) -> None:
    parts: list[Part] = []
    for place, block in blocks:
        if block.get("type") == "tool_result":
            parts += _add_tool_result(conversation, block, f"{place}.")
    for place, block in blocks:
        if block.get("type") != "tool_result":
            parts += read_block(block, f"{place}.")
    if parts or not blocks:
        conversation.add_user(simplified(parts))


def _add_tool_result(conversation: Conversation, block: Block, path: str) -> list[Part]:
    """Add a result; its images, which templates do not take there, are returned."""
    content = optional(block, "content", (str, list), "", path)
    if isinstance(content, str):
        content = [text_part(content)]
    parts = [
        part
        for place, inner in objects(content, f"{path}content")
        for part in read_block(inner, f"{place}.")
    ]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if optional(block, "is_error", bool, False, path):
        text = f"Error: {text}"
    conversation.add_tool_result(required(block, "tool_use_id", str, path), text)
    return [part for part in parts if part["type"] != "text"]


def read_block(block: Block, path: str) -> list[Part]:
    """The parts of a message that a block of a user's turn becomes."""
    kind = required(block, "type", str, path)
    if is_ignored(kind):
        return []
    if kind not in READERS:
        raise _unknown(kind, path)
    return READERS[kind](block, path)


def _read_text(block: Block, path: str) -> list[Part]:
    return [text_part(required(block, "text", str, path))]


def _read_image(block: Block, path: str) -> list[Part]:
    source = required(block, "source", dict, path)
    kind = required(source, "type", str, f"{path}source.")
    if kind == "url":
        return [image_part(required(source, "url", str, f"{path}source."))]
    if kind == "base64":
        data = required(source, "data", str, f"{path}source.")
        media_type = optional(source, "media_type", str, "image/png", f"{path}source.")
        return [image_part(f"data:{media_type};base64,{data}")]
    raise _unknown(kind, f"{path}source.")


def _read_document(block: Block, path: str) -> list[Part]:
    source = required(block, "source", dict, path)
    kind = required(source, "type", str, f"{path}source.")
    title = optional(block, "title", str, "", path)
    parts = [text_part(title)] if title else []
    if kind == "text":
        return [*parts, text_part(required(source, "data", str, f"{path}source."))]
    if kind == "content":
        content = required(source, "content", (str, list), f"{path}source.")
        return parts + _read_parts(content, f"{path}source.content")
    raise bad_request(
        f"{path}source.type: documents have to be text, got {kind!r}",
        param=f"{path}source.type",
    )


def _read_search_result(block: Block, path: str) -> list[Part]:
    heading = [optional(block, name, str, "", path) for name in ("title", "source")]
    content = optional(block, "content", list, [], path)
    parts = [text_part(text) for text in heading if text]
    return parts + _read_parts(content, f"{path}content")


def _read_parts(content: str | list[Any], path: str) -> list[Part]:
    if isinstance(content, str):
        return [text_part(content)]
    return [
        part
        for place, block in objects(content, path)
        for part in read_block(block, f"{place}.")
    ]


def _read_tool_reference(block: Block, path: str) -> list[Part]:
    return [text_part(required(block, "tool_name", str, path))]


READERS: dict[str, Callable[[Block, str], list[Part]]] = {
    "text": _read_text,
    "image": _read_image,
    "document": _read_document,
    "search_result": _read_search_result,
    "tool_reference": _read_tool_reference,
}

# Blocks of what ran on the vendor's own servers, which nobody else can read.
VENDOR_BLOCKS = ("compaction", "container_upload", "redacted_thinking")
VENDOR_ENDINGS = ("_tool_use", "_tool_result")  # of web searches, MCP and the like


def is_ignored(kind: str) -> bool:
    """Whether blocks of a kind mean something to their vendor only."""
    return kind in VENDOR_BLOCKS or kind.endswith(VENDOR_ENDINGS)


def _unknown(kind: str, path: str) -> Exception:
    return bad_request(
        f"{path}type: {kind!r} is not supported here", param=f"{path}type"
    )
