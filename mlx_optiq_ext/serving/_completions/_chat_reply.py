"""Writes replies of chat completions."""

from __future__ import annotations

import uuid
from typing import Any

from .._events import Call, CallPiece, CallStart, End, Event, Text, Thought
from ._reply import FINISH_REASONS, CompletionReply

Body = dict[str, Any]


class ChatReply(CompletionReply):
    """The messages of an assistant.

    A thought has the name that mlx-lm gives it, and the one that most clients know.
    """

    PREFIX = "chatcmpl"
    KIND = "chat.completion"
    PIECE_KIND = "chat.completion.chunk"

    def begin(self) -> Body:
        self._has_call = self._has_role = False
        fields: Body = {"logprobs": {"content": []}} if self._gives_logprobs else {}
        return fields | {"message": {"role": "assistant", "content": None}}

    def write(self, choice: Body, event: Event) -> Body | None:
        message = choice["message"]
        if isinstance(event, Text):
            message["content"] = (message["content"] or "") + event.text
            return self._delta(content=event.text)
        if isinstance(event, Thought):
            for name in ("reasoning", "reasoning_content"):
                message[name] = message.get(name, "") + event.text
            return self._delta(reasoning=event.text, reasoning_content=event.text)
        if isinstance(event, CallStart):
            return self._begin_call(message, event)
        if isinstance(event, CallPiece):
            return self._call_piece(message, event)
        self._has_call |= isinstance(event, Call)
        return None

    def end(self, choice: Body, end: End) -> Body:
        is_call = self._has_call and end.reason == "stop"
        choice["finish_reason"] = (
            "tool_calls" if is_call else FINISH_REASONS[end.reason]
        )
        return self._delta()

    @property
    def _gives_logprobs(self) -> bool:
        return self._request.gives_logprobs

    def _begin_call(self, message: Body, start: CallStart) -> Body:
        calls = message.setdefault("tool_calls", [])
        function = {"name": start.name, "arguments": ""}
        call_id = start.id or f"call_{uuid.uuid4().hex[:24]}"
        calls.append({"function": function, "type": "function", "id": call_id})
        added = calls[-1] | {"index": len(calls) - 1, "function": dict(function)}
        return self._delta(tool_calls=[added])

    def _call_piece(self, message: Body, piece: CallPiece) -> Body:
        calls = message["tool_calls"]
        calls[-1]["function"]["arguments"] += piece.text
        added = {"index": len(calls) - 1, "function": {"arguments": piece.text}}
        return self._delta(tool_calls=[added])

    def _delta(self, **fields: Any) -> Body:
        """What a piece adds; the first says who speaks."""
        role = {} if self._has_role else {"role": "assistant"}
        self._has_role = True
        return {"delta": role | fields}
