from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._responses import ResponseRequest, page, read_request
from mlx_optiq_ext.serving._store import ResponseStore, Stored

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def read(value: Any, **fields: Any) -> ResponseRequest:
    store = fields.pop("kept", ResponseStore())
    return read_request({"model": "m", "input": value} | fields, store)


def messages(value: Any, **fields: Any) -> list[dict[str, Any]]:
    return read(value, **fields).request.messages


def error(value: Any, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        read(value, **fields)
    assert caught.value.status == 400
    return caught.value


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_string_is_a_user_message() -> None:
    assert messages("hi") == [message("user", "hi")]


def test_instructions_and_leading_developer_messages_are_one_system_message() -> None:
    items = [message("developer", "two"), message("system", "3"), message("user", "q")]
    assert messages(items, instructions="one") == [
        message("system", "one\n\ntwo\n\n3"),
        message("user", "q"),
    ]


def test_a_later_developer_message_stays_where_it_is() -> None:
    items = [
        message("user", "q"),
        message("assistant", "a"),
        message("developer", "mind"),
        message("user", "r"),
    ]
    assert messages(items, instructions="one") == [
        message("system", "one"),
        message("user", "q"),
        message("assistant", "a"),
        message("user", "mind\nr"),
    ]


def test_a_thought_stays_at_its_own_turn() -> None:
    thought = {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "cut off"}],
    }
    items = [
        message("user", "q"),
        thought,
        message("user", "again"),
        message("assistant", "a"),
    ]
    assert messages(items) == [
        message("user", "q"),
        {"role": "assistant", "content": "", "reasoning_content": "cut off"},
        message("user", "again"),
        message("assistant", "a"),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        "web_search_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_list_tools",
        "tool_search_call",
        "tool_search_output",
        "compaction",
    ],
)
def test_items_of_the_vendor_are_passed_over(kind: str) -> None:
    items = [message("user", "q"), {"type": kind, "id": "x"}, message("assistant", "a")]
    assert messages(items) == [message("user", "q"), message("assistant", "a")]


def test_fields_of_another_api_are_honoured_or_refused() -> None:
    asked = read("q", max_tokens=7, stop_sequences=["x"], reasoning_effort="none")
    assert asked.request.max_tokens == 7
    assert asked.request.stop == ("x",)
    assert asked.request.has_thinking is False
    for wrong in (
        {"n": 2},
        {"prompt": {"id": "x"}},
    ):
        with pytest.raises(APIError) as caught:
            read("q", **wrong)
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.param in wrong


def test_the_format_of_the_answer() -> None:
    layout = {"type": "json_schema", "name": "x", "schema": {"type": "array"}}
    request = read("q", text={"format": layout}).request
    assert request.answer is not None
    assert request.answer.content == {"type": "array"}
    assert request.answer_path == "text.format.schema"


def test_a_turn_of_codex_comes_back_as_it_was() -> None:
    items = [
        message("developer", [{"type": "input_text", "text": "rules"}]),
        message("user", [{"type": "input_text", "text": "go"}]),
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
            "encrypted_content": None,
        },
        message("assistant", [{"type": "output_text", "text": "ok"}]) | {"phase": "x"},
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "search",
            "namespace": "mcp",
            "arguments": '{"x": 1}',
        },
        {
            "type": "function_call_output",
            "call_id": "call_1",
            "output": [{"type": "input_text", "text": "found"}],
        },
        {
            "type": "custom_tool_call",
            "call_id": "call_2",
            "name": "apply_patch",
            "input": "*** x",
        },
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
    ]
    found = messages(items, include=["reasoning.encrypted_content"], store=False)
    assert found[:2] == [message("system", "rules"), message("user", "go")]
    turn = found[2]
    assert (turn["content"], turn["reasoning_content"]) == ("ok", "hm")
    function = turn["tool_calls"][0]["function"]
    assert function == {"name": "mcp__search", "arguments": '{"x": 1}'}
    assert found[3] == {"role": "tool", "tool_call_id": "call_1", "content": "found"}
    patch = found[4]["tool_calls"][0]["function"]
    assert json.loads(patch["arguments"]) == {"input": "*** x"}
    assert found[5]["content"] == "done"


def test_a_thought_without_content_is_its_summary() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}
    found = messages([message("user", "q"), item, message("assistant", "a")])
    assert found[1]["reasoning_content"] == "s"


def test_arguments_that_are_no_object_do_not_end_the_conversation() -> None:
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{bad"}
    function = messages([message("user", "q"), item])[1]["tool_calls"][0]
    assert json.loads(function["function"]["arguments"]) == {"arguments": "{bad"}


def test_images_are_parts() -> None:
    parts = [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
    ]
    content = messages([message("user", parts)])[0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]


def stored(response_id: str, text: str, reply: str) -> Stored:
    items = [message("user", text) | {"type": "message", "id": f"msg_{text}"}]
    content = [{"type": "output_text", "text": reply, "annotations": []}]
    output = message("assistant", content) | {"type": "message", "id": f"msg_{reply}"}
    response = {"id": response_id, "output": [output], "instructions": "old"}
    return Stored(response, items)


def test_a_chain_of_responses_is_one_conversation_without_old_instructions() -> None:
    store = ResponseStore()
    store.add(stored("resp_1", "a", "b"))
    request = read("c", previous_response_id="resp_1", kept=store, instructions="new")
    assert request.request.messages == [
        message("system", "new"),
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
    ]
    assert all("id" in item for item in request.items)


def test_an_unknown_response_is_an_error_with_its_code() -> None:
    found = error("q", previous_response_id="resp_9")
    assert found.code == "previous_response_not_found"
    assert found.param == "previous_response_id"


def test_a_reference_stands_for_an_item_of_any_response() -> None:
    store = ResponseStore()
    store.add(stored("resp_1", "a", "b"))
    items = [{"type": "item_reference", "id": "msg_b"}, message("user", "c")]
    assert messages(items, kept=store)[0] == message("assistant", "b")
    assert "msg_x" in error([{"id": "msg_x"}], kept=store).message


def test_tools_of_all_kinds_are_functions_to_the_model() -> None:
    tools = [
        FUNCTION,
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "d",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
        },
        {
            "type": "namespace",
            "name": "mcp",
            "description": "",
            "tools": [FUNCTION | {"name": "search"}],
        },
        {"type": "web_search"},
    ]
    chat = read("q", tools=tools).request
    functions = [tool["function"] for tool in chat.tools or []]
    assert [function["name"] for function in functions] == [
        "f",
        "apply_patch",
        "mcp__search",
    ]
    assert "start: x" in functions[1]["description"]
    assert functions[1]["parameters"]["required"] == ["input"]


def test_the_choices_of_a_tool() -> None:
    tools = [FUNCTION, FUNCTION | {"name": "g"}]

    def choose(choice: Any, **fields: Any) -> tuple[list[str], bool]:
        chat = read("q", tools=tools, tool_choice=choice, **fields).request
        return [t["function"]["name"] for t in chat.tools or []], chat.must_call

    assert choose("auto") == (["f", "g"], False)
    assert choose("none") == ([], False)
    assert choose("required") == (["f", "g"], True)
    assert choose({"type": "function", "name": "g"}) == (["g"], True)
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [tools[0]]}
    assert choose(allowed) == (["f"], False)
    assert error("q", tools=tools, tool_choice={"type": "mcp"}).param
    assert error("q", tool_choice="required").param == "tool_choice"
    assert read("q", parallel_tool_calls=False).request.one_call


@pytest.mark.parametrize(
    ("effort", "thinks"), [("none", False), ("minimal", False), ("low", True)]
)
def test_the_effort_decides_whether_the_model_thinks(effort: str, thinks: bool) -> None:
    assert read("q", reasoning={"effort": effort}).request.has_thinking is thinks
    assert read("q").request.has_thinking is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "odd"}]}, "input.0.type"),
        ({"input": [{"type": [], "role": "user"}]}, "input.0.type"),
        ({"input": [{"id": 5, "role": "user", "content": "x"}]}, "input.0.id"),
        ({"input": [message("robot", "x")]}, "input.0.role"),
        ({"model": 5}, "model"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools.1.name"),
        ({"tool_choice": "odd"}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"reasoning": {"effort": "odd"}}, "reasoning.effort"),
        ({"truncation": "odd"}, "truncation"),
        ({"previous_response_id": 5}, "previous_response_id"),
    ],
)
def test_an_error_names_the_field_at_fault(fields: Any, param: str) -> None:
    fields = {"value": fields.pop("input", "hi")} | fields
    assert error(**fields).param == param


def test_what_only_the_vendor_understands_is_ignored() -> None:
    read(
        "q",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={},
        service_tier="auto",
        user="u",
        text={"verbosity": "low"},
        background=False,
    )


def test_pages_of_items() -> None:
    items = [{"id": f"i{number}", "type": "x"} for number in range(5)]
    first = page(items, {"limit": ["2"]})
    assert [item["id"] for item in first["data"]] == ["i4", "i3"]
    assert first["has_more"]
    assert (first["first_id"], first["last_id"]) == ("i4", "i3")
    last = page(items, {"after": ["i3"], "order": ["asc"]})
    assert [item["id"] for item in last["data"]] == ["i4"]
    assert not last["has_more"]
    for query in ({"limit": ["0"]}, {"limit": ["x"]}, {"after": ["zz"]}):
        with pytest.raises(APIError):
            page(items, query)
