from __future__ import annotations

import json
from typing import Any

from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._events import Call, End, Event, Text, Thought, Usage
from mlx_optiq_ext.serving._responses import ResponseReply, read_request
from mlx_optiq_ext.serving._store import ResponseStore

from .events import bodies_of

Body = dict[str, Any]

TOOLS = [
    {"type": "function", "name": "f"},
    {"type": "custom", "name": "apply_patch"},
    {
        "type": "namespace",
        "name": "mcp",
        "description": "",
        "tools": [{"type": "function", "name": "search"}],
    },
]


def make(**fields: Any) -> ResponseReply:
    body = {"model": "gpt-x", "input": "hi", "tools": TOOLS} | fields
    request = read_request(body, ResponseStore())
    return ResponseReply("gpt-x", request, Usage(10, 4, 7, 2))


def write(*events: Event, **fields: Any) -> tuple[list[Body], Body]:
    reply = make(**fields)
    return bodies_of(reply, events), reply.result()


def kinds(bodies: list[Body]) -> list[str]:
    return [body["type"].removeprefix("response.") for body in bodies]


def test_the_events_of_a_thought_a_text_and_a_call_in_order() -> None:
    bodies, _ = write(Thought("h"), Text("a"), Text("b"), Call("f", {}), End("stop"))
    assert kinds(bodies) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_sequence_numbers_count_up_and_ids_never_change() -> None:
    bodies, response = write(
        Thought("h"), Text("a"), Call("f", {"x": 1}), Call("f", {}), End("stop")
    )
    assert [body["sequence_number"] for body in bodies] == [*range(len(bodies))]
    for index, item in enumerate(response["output"]):
        of_item = [body for body in bodies if body.get("output_index") == index]
        assert of_item[0]["type"] == "response.output_item.added"
        assert of_item[-1]["type"] == "response.output_item.done"
        assert of_item[-1]["item"] == item
        ids = {body.get("item_id") or body["item"]["id"] for body in of_item}
        assert ids == {item["id"]}
    assert bodies[-1]["response"] == response
    assert {body["response"]["id"] for body in bodies if "response" in body} == {
        response["id"]
    }


def test_an_item_is_closed_before_the_next_is_added() -> None:
    bodies, _ = write(
        Text("a"), Call("f", {}), Text("b"), Call("f", {}), Thought("c"), End("stop")
    )
    is_open = False
    for kind in kinds(bodies):
        if kind == "output_item.added":
            assert not is_open
            is_open = True
        elif kind == "output_item.done":
            is_open = False
    assert not is_open


def test_a_call_keeps_its_arguments() -> None:
    arguments = {"text": 'ü "😀"', "deep": {"x": [1]}}
    bodies, response = write(Call("f", arguments), End("stop"))
    item = response["output"][0]
    assert json.loads(item["arguments"]) == arguments
    assert item["call_id"].startswith("call_")
    deltas = [body["delta"] for body in bodies if "delta" in body]
    assert "".join(deltas) == item["arguments"]
    added = bodies[2]["item"]
    assert (added["arguments"], added["status"]) == ("", "in_progress")


def test_a_free_form_tool_gets_its_input_as_it_is() -> None:
    bodies, response = write(Call("apply_patch", {"input": "*** x"}), End("stop"))
    item = response["output"][0]
    assert (item["type"], item["name"]) == ("custom_tool_call", "apply_patch")
    assert item["input"] == "*** x"
    assert item["id"].startswith("ctc_")
    assert "custom_tool_call_input.done" in kinds(bodies)


def test_a_tool_of_a_namespace_has_both_names() -> None:
    _, response = write(Call("mcp__search", {}), End("stop"))
    item = response["output"][0]
    assert (item["namespace"], item["name"]) == ("mcp", "search")


def test_a_tool_of_a_namespace_may_be_called_by_its_name_alone() -> None:
    _, response = write(Call("search", {}), End("stop"))
    item = response["output"][0]
    assert (item["namespace"], item["name"]) == ("mcp", "search")


def test_a_tool_that_nobody_offered_is_passed_on() -> None:
    _, response = write(Call("made_up", {}), End("stop"))
    assert response["output"][0]["name"] == "made_up"


def test_an_incomplete_response_says_why() -> None:
    for end in (End("length"), End("context")):
        bodies, response = write(Text("a"), end)
        assert kinds(bodies)[-1] == "incomplete"
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"


def test_a_summary_is_there_only_if_it_was_asked_for() -> None:
    _, response = write(Thought("hm"), End("stop"))
    item = response["output"][0]
    assert item["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert item["summary"] == []
    assert item["encrypted_content"] is None
    bodies, response = write(Thought("hm"), End("stop"), reasoning={"summary": "auto"})
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "reasoning_summary_part.added" in kinds(bodies)


def test_usage_includes_cached_tokens() -> None:
    _, response = write(Text("x"), End("stop"))
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 17,
    }


def test_the_request_is_echoed() -> None:
    fields = {
        "instructions": "be brief",
        "metadata": {"k": "v"},
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 9,
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "store": False,
        "truncation": "auto",
    }
    _, response = write(End("stop"), **fields)
    assert {name: response[name] for name in fields} == fields
    assert response["tools"] == TOOLS


def test_a_failure_closes_the_open_item() -> None:
    reply = make()
    bodies = [*reply.start(), *reply.feed(Text("x"))]
    error = APIError(400, "too long", code="context_length_exceeded")
    last = [*reply.failure(error)]
    assert kinds(last)[-2:] == ["output_item.done", "failed"]
    response = last[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "context_length_exceeded"
    assert last[-1]["sequence_number"] == len(bodies) + len(last) - 1


def test_a_failure_before_the_start_starts_all_the_same() -> None:
    bodies = [*make().failure(APIError(500, "broken"))]
    assert kinds(bodies) == ["created", "in_progress", "failed"]
