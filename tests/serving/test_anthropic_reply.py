"""Generated replies become messages and events of the Anthropic API."""

from __future__ import annotations

import json
from typing import Any

from mlx_optiq_ext.serving._anthropic import MessageReply
from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._events import Call, End, Event, Text, Thought, Usage

from .events import bodies_of

Body = dict[str, Any]


def write(*events: Event, usage: Usage | None = None) -> tuple[list[Body], Body]:
    reply = MessageReply("claude-x", usage or Usage(10, 4, 7, 2), "req_1")
    return bodies_of(reply, events), reply.result()


def kinds(bodies: list[Body]) -> list[str]:
    return [
        f"{body['type']} {body['index']}" if "index" in body else body["type"]
        for body in bodies
    ]


def test_blocks_follow_one_another_and_only_one_is_open() -> None:
    bodies, _ = write(
        Thought("hm"),
        Text("a"),
        Text("b"),
        Call("f", {"x": 1}),
        Text("c"),
        Call("g", {}),
        Call("h", {}),
        End("stop"),
    )
    index, is_open = -1, False
    for body in bodies[1:-2]:
        if body["type"] == "content_block_start":
            assert not is_open
            index, is_open = index + 1, True
        assert is_open
        assert body["index"] == index
        is_open = body["type"] != "content_block_stop"
    assert not is_open
    assert index == 5


def test_the_events_of_a_thought_end_with_one_signature() -> None:
    bodies, message = write(Thought("h"), Thought("m"), Text("x"), End("stop"))
    deltas = [
        body["delta"]["type"] for body in bodies if "index" in body if "delta" in body
    ]
    assert deltas == [
        "thinking_delta",
        "thinking_delta",
        "signature_delta",
        "text_delta",
    ]
    start = bodies[1]["content_block"]
    assert start == {"type": "thinking", "thinking": "", "signature": ""}
    assert message["content"][0]["thinking"] == "hm"
    assert message["content"][0]["signature"]


def test_a_call_starts_without_input_which_a_delta_brings() -> None:
    arguments = {"text": 'ü "😀"', "deep": {"x": [1]}}
    bodies, message = write(Call("f", arguments), End("stop"))
    start = bodies[1]["content_block"]
    assert start["type"] == "tool_use"
    assert start["id"].startswith("toolu_")
    assert start["input"] == {}
    delta = bodies[2]["delta"]
    assert delta["type"] == "input_json_delta"
    assert json.loads(delta["partial_json"]) == arguments
    assert message["content"][0]["input"] == arguments
    assert message["content"][0]["id"] == start["id"]


def test_every_end_has_its_stop_reason() -> None:
    def reason(*events: Event) -> tuple[str, str | None]:
        bodies, message = write(*events)
        assert bodies[-1] == {"type": "message_stop"}
        assert bodies[-2]["delta"]["stop_reason"] == message["stop_reason"]
        return message["stop_reason"], message["stop_sequence"]

    assert reason(Text("x"), End("stop")) == ("end_turn", None)
    assert reason(End("stop")) == ("end_turn", None)
    assert reason(Text("x"), End("length")) == ("max_tokens", None)
    assert reason(End("stop_sequence", "S")) == ("stop_sequence", "S")
    assert reason(Call("f", {}), End("stop")) == ("tool_use", None)
    assert reason(Call("f", {}), End("length")) == ("max_tokens", None)
    assert reason(End("context")) == ("model_context_window_exceeded", None)


def test_usage_leaves_cached_tokens_out_of_the_input() -> None:
    bodies, message = write(Text("x"), End("stop"))
    expected = {
        "input_tokens": 6,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 2},
    }
    assert bodies[0]["message"]["usage"] == expected
    assert bodies[-2]["usage"] == expected
    assert message["usage"] == expected


def test_the_message_starts_empty() -> None:
    bodies, message = write(Text("x"), End("stop"))
    start = bodies[0]["message"]
    assert (start["id"], start["model"]) == (message["id"], "claude-x")
    assert start["content"] == []
    assert start["stop_reason"] is None


def test_an_empty_reply_has_no_blocks() -> None:
    bodies, message = write(End("stop"))
    assert kinds(bodies) == ["message_start", "message_delta", "message_stop"]
    assert message["content"] == []


def test_a_failure_is_an_error_event() -> None:
    reply = MessageReply("m", Usage(), "req_1")
    list(reply.start())
    assert list(reply.failure(APIError(500, "broken"))) == [
        {
            "type": "error",
            "error": {"type": "api_error", "message": "broken"},
            "request_id": "req_1",
        }
    ]
