"""Writes the reply to a Messages request, event by event."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterator
from typing import Any

from .._errors import APIError, anthropic_body
from .._events import Call, CallPiece, CallStart, End, Event, Text, Thought, Usage

Body = dict[str, Any]

STOP_REASONS = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "context": "model_context_window_exceeded",
}

# The kind of a block's deltas, and the field of it and of the block with the text.
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessageReply:
    """Turns events into the server-sent events of one message.

    Args:
        model (str): The id that the client used.
        usage (Usage): Counted by whoever makes the events.
        request_id (str): For error bodies.
    """

    def __init__(self, model: str, usage: Usage, request_id: str):
        self._usage = usage
        self._request_id = request_id
        self._is_open = False
        self._message: Body = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }

    def start(self) -> Iterator[Body]:
        message = self._message | {"content": [], "usage": self._usage_body()}
        yield {"type": "message_start", "message": message}

    def feed(self, event: Event) -> Iterator[Body]:
        if isinstance(event, Text):
            yield from self._piece("text", event.text)
        elif isinstance(event, Thought):
            yield from self._piece("thinking", event.text)
        elif isinstance(event, CallStart):
            yield from self._begin_call(event.name)
        elif isinstance(event, CallPiece):
            yield self._input_delta(event.text)
        elif isinstance(event, Call):
            self._blocks[-1]["input"] = event.arguments
            yield from self._close()
        elif isinstance(event, End):
            yield from self._end(event)

    def finish(self) -> Iterator[Body]:
        yield {"type": "message_stop"}

    def result(self) -> Body:
        """The whole message, once its end was fed."""
        return self._message

    def failure(self, error: APIError) -> Iterator[Body]:
        yield anthropic_body(error, self._request_id)

    def keep_alive(self) -> Body:
        return {"type": "ping"}

    def _piece(self, kind: str, text: str) -> Iterator[Body]:
        delta, name = DELTAS[kind]
        if not self._is_in(kind):
            block = {"type": kind, name: ""}
            if kind == "thinking":
                block["signature"] = ""
            yield from self._open(block)
        self._blocks[-1][name] += text
        yield self._delta({"type": delta, name: text})

    def _begin_call(self, name: str) -> Iterator[Body]:
        block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}"}
        yield from self._open(block | {"name": name, "input": {}})

    def _input_delta(self, text: str) -> Body:
        return self._delta({"type": "input_json_delta", "partial_json": text})

    def _end(self, end: End) -> Iterator[Body]:
        yield from self._close()
        has_calls = any(block["type"] == "tool_use" for block in self._blocks)
        is_call = has_calls and end.reason == "stop"
        delta = {
            "stop_reason": "tool_use" if is_call else STOP_REASONS[end.reason],
            "stop_sequence": end.stop_sequence,
        }
        self._message |= delta | {"usage": self._usage_body()}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage_body()}

    @property
    def _blocks(self) -> list[Body]:
        return self._message["content"]

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self._blocks[-1]["type"] == kind

    def _open(self, block: Body) -> Iterator[Body]:
        yield from self._close()
        self._blocks.append(dict(block))
        self._is_open = True
        index = len(self._blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": block}

    def _delta(self, delta: Body) -> Body:
        index = len(self._blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _close(self) -> Iterator[Body]:
        if not self._is_open:
            return
        block = self._blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = sign(block["thinking"])
            signature = block["signature"]
            yield self._delta({"type": "signature_delta", "signature": signature})
        self._is_open = False
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _usage_body(self) -> Body:
        usage = self._usage
        return {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"thinking_tokens": usage.num_thinking_tokens},
        }


def sign(thinking: str) -> str:
    """A signature for clients that drop thoughts without one; nobody checks it."""
    return base64.b64encode(hashlib.sha256(thinking.encode()).digest()).decode()
