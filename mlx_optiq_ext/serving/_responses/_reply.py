"""Writes the reply to a Responses request, event by event."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Iterator
from typing import Any

from .._conversation import to_json
from .._errors import APIError
from .._events import (
    Call,
    CallPiece,
    CallStart,
    End,
    Event,
    Text,
    Thought,
    Token,
    Usage,
)
from .._logprobs import logprob_entry
from .._speculation import timings
from ._request import ResponseRequest
from ._tools import ToolName

Body = dict[str, Any]

# The field of a call that holds what the model wrote, and the name of its events.
CALL_FIELDS = {
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
}


class ResponseReply:
    """Turns events into the server-sent events of one response.

    Args:
        model (str): The id that the client used.
        request (ResponseRequest): What the response echoes, and its tools.
        usage (Usage): Counted by whoever makes the events.
    """

    def __init__(self, model: str, request: ResponseRequest, usage: Usage):
        self._usage = usage
        self._request = request
        self._num_events = 0
        self._is_open = False
        # Tokens whose text has not been sent yet.
        self._tokens: list[Token] = []
        self._response: Body = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **request.echo,
        }

    def start(self) -> Iterator[Body]:
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())

    def feed(self, event: Event) -> Iterator[Body]:
        if isinstance(event, Text):
            yield from self._text(event.text)
        elif isinstance(event, Thought):
            yield from self._thought(event.text)
        elif isinstance(event, CallStart):
            yield from self._begin_call(event.name)
        elif isinstance(event, CallPiece):
            yield from self._call_piece(event.text)
        elif isinstance(event, Call):
            yield from self._call(event)
        elif isinstance(event, Token):
            self._tokens.append(event)
        elif isinstance(event, End):
            yield from self._end(event)

    def finish(self) -> Iterator[Body]:
        status = self._response["status"]
        yield self._event(f"response.{status}", response=self._snapshot())

    def result(self) -> Body:
        """The whole response, once its end was fed."""
        return self._response

    def failure(self, error: APIError) -> Iterator[Body]:
        if not self._num_events:
            yield from self.start()
        yield from self._close("incomplete")
        code = error.code or "server_error"
        details = {"code": code, "message": error.message}
        self._response |= {"status": "failed", "error": details}
        yield self._event("response.failed", response=self._snapshot())

    def keep_alive(self) -> None:
        """The API has no event that says nothing: a comment keeps a stream alive."""

    @property
    def _output(self) -> list[Body]:
        return self._response["output"]

    def _text(self, text: str) -> Iterator[Body]:
        if not self._is_in("message"):
            part = {
                "type": "output_text",
                "text": "",
                "annotations": [],
                "logprobs": [],
            }
            self._tokens = tokens_of(text, self._tokens)
            yield from self._open("message", "msg", content=[], role="assistant")
            yield from self._open_part(part)
        logprobs = self._take_logprobs()
        self._part["text"] += text
        self._part["logprobs"] += logprobs
        yield self._item_event(
            "response.output_text.delta",
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )

    def _take_logprobs(self) -> list[Body]:
        tokens, self._tokens = self._tokens, []
        is_asked = self._request.request.gives_logprobs
        return [logprob_entry(token) for token in tokens] if is_asked else []

    def _thought(self, text: str) -> Iterator[Body]:
        self._tokens.clear()
        if not self._is_in("reasoning"):
            yield from self._open(
                "reasoning", "rs", summary=[], content=[], encrypted_content=None
            )
            yield from self._open_part({"type": "reasoning_text", "text": ""})
        self._part["text"] += text
        yield self._item_event(
            "response.reasoning_text.delta", content_index=0, delta=text
        )

    def _begin_call(self, name: str) -> Iterator[Body]:
        tool = self._request.tool_box.client_name(name)
        kind = "custom_tool_call" if tool.is_custom else "function_call"
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        fields = {CALL_FIELDS[kind][0]: "", "call_id": call_id, **_named(tool)}
        yield from self._open(kind, "ctc" if tool.is_custom else "fc", **fields)

    def _call_piece(self, text: str) -> Iterator[Body]:
        # The input of a free-form tool is one of the arguments, so it comes at the end.
        if self._is_in("function_call"):
            self._item["arguments"] += text
            yield self._item_event("response.function_call_arguments.delta", delta=text)

    def _call(self, call: Call) -> Iterator[Body]:
        self._tokens.clear()
        is_custom = self._is_in("custom_tool_call")
        field, events = CALL_FIELDS[self._item["type"]]
        if is_custom:
            text = self._item[field] = _free_form(call)
            yield self._item_event(f"response.{events}.delta", delta=text)
        done = {field: self._item[field]}
        if not is_custom:
            done["name"] = self._item["name"]
        yield self._item_event(f"response.{events}.done", **done)
        yield from self._close()

    def _end(self, end: End) -> Iterator[Body]:
        is_complete = end.reason in ("stop", "stop_sequence")
        status = "completed" if is_complete else "incomplete"
        yield from self._close(status)
        self._response |= {"status": status, "usage": self._usage_body()}
        self._response |= timings(self._usage)
        if is_complete:
            self._response["completed_at"] = int(time.time())
        else:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}

    @property
    def _item(self) -> Body:
        return self._output[-1]

    @property
    def _part(self) -> Body:
        return self._item["content"][0]

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self._item["type"] == kind

    def _open(self, kind: str, prefix: str, **fields: Any) -> Iterator[Body]:
        yield from self._close()
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, **fields}
        self._output.append(item | {"status": "in_progress"})
        self._is_open = True
        yield self._event(
            "response.output_item.added",
            output_index=len(self._output) - 1,
            item=copy.deepcopy(self._item),
        )

    def _open_part(self, part: Body) -> Iterator[Body]:
        self._item["content"].append(part)
        yield self._item_event(
            "response.content_part.added", content_index=0, part=copy.deepcopy(part)
        )

    def _close(self, status: str = "completed") -> Iterator[Body]:
        if not self._is_open:
            return
        self._is_open = False
        if self._item["type"] == "message":
            yield from self._close_part("output_text", logprobs=self._part["logprobs"])
        elif self._item["type"] == "reasoning":
            yield from self._close_part("reasoning_text")
            yield from self._summary()
        self._item["status"] = status
        yield self._event(
            "response.output_item.done",
            output_index=len(self._output) - 1,
            item=copy.deepcopy(self._item),
        )

    def _close_part(self, name: str, **fields: Any) -> Iterator[Body]:
        text = self._part["text"]
        yield self._item_event(
            f"response.{name}.done", content_index=0, text=text, **fields
        )
        yield self._item_event(
            "response.content_part.done",
            content_index=0,
            part=copy.deepcopy(self._part),
        )

    def _summary(self) -> Iterator[Body]:
        """The thought again, in the place where a client that asked looks for it."""
        if self._request.echo["reasoning"]["summary"] is None:
            return
        text = self._part["text"]
        part = {"type": "summary_text", "text": text}
        self._item["summary"].append(part)
        name = "response.reasoning_summary"
        empty = part | {"text": ""}
        yield self._item_event(f"{name}_part.added", summary_index=0, part=empty)
        yield self._item_event(f"{name}_text.delta", summary_index=0, delta=text)
        yield self._item_event(f"{name}_text.done", summary_index=0, text=text)
        yield self._item_event(f"{name}_part.done", summary_index=0, part=part)

    def _item_event(self, kind: str, **fields: Any) -> Body:
        return self._event(
            kind,
            item_id=self._item["id"],
            output_index=len(self._output) - 1,
            **fields,
        )

    def _event(self, kind: str, **fields: Any) -> Body:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _snapshot(self) -> Body:
        return self._response | {"output": list(self._output)}

    def _usage_body(self) -> Body:
        usage = self._usage
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_thinking_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        }


def tokens_of(text: str, tokens: list[Token]) -> list[Token]:
    """The tokens that a text begins with, without those of markers before it."""
    spellings = [token.text for token in tokens]
    while text in "".join(spellings[1:]):
        del spellings[0]
    return tokens[len(tokens) - len(spellings) :]


def _named(tool: ToolName) -> Body:
    if tool.namespace is None:
        return {"name": tool.name}
    return {"name": tool.name, "namespace": tool.namespace}


def _free_form(call: Call) -> str:
    """The input of a free-form tool, whatever the model called its argument."""
    text = call.arguments.get("input", next(iter(call.arguments.values()), ""))
    return text if isinstance(text, str) else to_json(text)
