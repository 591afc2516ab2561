from __future__ import annotations

import logging
from typing import Any

import pytest

from mlx_optiq_ext.serving._anthropic import read_request
from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._request import Request

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def read(*messages: Any, **fields: Any) -> Request:
    body = {"model": "m", "max_tokens": 5, "messages": [*messages]} | fields
    return read_request({k: v for k, v in body.items() if v is not ...})


def error(*messages: Any, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        read(*messages, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "system",
    [
        "be brief",
        [text("be brief")],
        [text("x-anthropic-billing-header: v; cch=abc;"), text("be brief")],
        [text("x-anthropic-billing-header: v; cch=abc;\nbe brief")],
        "x-anthropic-billing-header: v; cch=abc;\nbe brief",
    ],
)
def test_the_system_prompt_comes_first_without_the_billing_header(system: Any) -> None:
    assert read(user("hi"), system=system).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    "kind",
    [
        "advisor_tool_result",
        "bash_code_execution_tool_result",
        "code_execution_tool_result",
        "compaction",
        "mcp_tool_result",
        "mcp_tool_use",
        "redacted_thinking",
        "server_tool_use",
        "tool_search_tool_result",
        "web_search_tool_result",
    ],
)
def test_blocks_of_the_vendor_are_passed_over(kind: str) -> None:
    request = read(user("q"), assistant([{"type": kind}, text("a")]), user("r"))
    assert request.messages == [user("q"), assistant("a"), user("r")]


def test_fields_of_another_api_are_honoured_or_refused() -> None:
    assert read(user("q"), stop="x").stop == ("x",)
    for wrong in (
        {"n": 2},
        {"logprobs": True},
    ):
        assert error(user("q"), **wrong).code == "unsupported_parameter"


def test_a_budget_for_thoughts_is_taken() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    request = read(user("q"), thinking=thinking)
    assert request.has_thinking
    assert request.max_thinking_tokens == 1024


def test_the_format_of_the_answer_is_read_where_clients_put_it() -> None:
    schema = {"type": "object"}
    layout = {"type": "json_schema", "schema": schema}
    for fields, path in (
        ({"output_config": {"format": layout}}, "output_config.format.schema"),
        ({"output_format": layout}, "output_format.schema"),
    ):
        request = read(user("q"), **fields)
        assert request.answer is not None
        assert request.answer.content == schema
        assert request.answer_path == path
    both = {"output_config": {"format": layout}, "output_format": layout}
    assert error(user("q"), **both).param == "output_format.schema"
    assert error(user("q"), assistant("{"), output_format=layout).status == 400


def test_a_leading_system_message_joins_the_system_prompt() -> None:
    chat = read({"role": "system", "content": "two"}, user("hi"), system="one")
    assert chat.messages[0] == {"role": "system", "content": "one\n\ntwo"}


def test_a_later_system_message_stays_where_it_is() -> None:
    chat = read(
        user("a"), assistant("b"), {"role": "system", "content": "c"}, user("d")
    )
    assert chat.messages[2:] == [{"role": "user", "content": "c\nd"}]


@pytest.mark.parametrize("role", ["ctx", "msg"])
def test_roles_of_claude_code_are_the_users(role: str) -> None:
    chat = read({"role": role, "content": "a"}, user("b"))
    assert chat.messages == [{"role": "user", "content": "a\nb"}]


def test_neighbours_of_one_role_merge() -> None:
    chat = read(user("a"), user([text("b"), text("c")]), assistant("d"), user("e"))
    assert [message["content"] for message in chat.messages] == ["a\nb\nc", "d", "e"]


def test_tool_results_come_before_the_text_of_their_turn() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}}
    results = [
        text("and now?"),
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("one")]},
        {
            "type": "tool_result",
            "tool_use_id": "toolu_2",
            "content": "two",
            "is_error": True,
        },
        {"type": "tool_result", "tool_use_id": "toolu_3"},
    ]
    chat = read(user("go"), assistant([text("ok"), call]), user(results))
    turn = chat.messages[1]
    assert turn["content"] == "ok"
    assert turn["tool_calls"] == [
        {
            "id": "toolu_1",
            "type": "function",
            "function": {"name": "f", "arguments": '{"x": 1}'},
        }
    ]
    assert chat.messages[2:] == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": "one"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: two"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "and now?"},
    ]


def test_images_are_parts_those_of_results_the_users() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE, text("x")]}
    part = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AAAA"},
    }
    chat = read(user([text("look"), IMAGE]), assistant("ok"), user([result]))
    assert chat.messages[0]["content"] == [text("look"), part]
    assert chat.messages[2] == {"role": "tool", "tool_call_id": "t", "content": "x"}
    assert chat.messages[3] == {"role": "user", "content": [part]}


def test_documents_and_search_results_are_text() -> None:
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "body"},
    }
    found = {
        "type": "search_result",
        "title": "U",
        "source": "s",
        "content": [text("v")],
    }
    assert read(user([document, found])).messages[0]["content"] == "T\nbody\nU\ns\nv"
    pdf = document | {"source": {"type": "base64", "data": "AAAA"}}
    assert "documents have to be text" in error(user([pdf])).message


def test_thoughts_go_back_and_redacted_ones_are_dropped() -> None:
    turn = assistant(
        [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "redacted_thinking", "data": "xyz"},
            text("a"),
        ]
    )
    chat = read(user("q"), turn, user("r"))
    assert chat.messages[1]["reasoning_content"] == "hm"
    assert chat.messages[1]["content"] == "a"


def test_a_last_assistant_message_begins_the_reply() -> None:
    chat = read(user("q"), assistant("The answer is"))
    assert chat.prefill == "The answer is"
    assert chat.messages == [{"role": "user", "content": "q"}]
    assert chat.has_thinking is False


def test_a_last_assistant_message_with_calls_is_refused() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    assert "tool_result" in error(user("q"), assistant([call])).message


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "between_tools"])
def test_thinking_that_is_asked_for(kind: str) -> None:
    assert read(user("q"), thinking={"type": kind}).has_thinking is True


def test_thinking_that_is_not_asked_for() -> None:
    assert read(user("q"), thinking={"type": "disabled"}).has_thinking is False
    chat = read(user("q"))
    assert (chat.has_thinking, chat.thinks_by_default) == (None, False)


def test_thinking_contradicts_a_begun_reply_and_a_forced_call() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert error(user("q"), assistant("a"), thinking=thinking).param == "messages"
    forced = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    assert error(user("q"), thinking=thinking, **forced).param == "tool_choice"


def test_tools_are_functions_and_those_of_a_vendor_are_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    search = {"type": "web_search_20250305", "name": "web_search"}
    chat = read(user("q"), tools=[TOOL | {"cache_control": {}}, search])
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert chat.tools == [{"type": "function", "function": function}]
    assert "web_search_20250305" in caplog.text


def test_the_choices_of_a_tool() -> None:
    tools = [TOOL, TOOL | {"name": "g"}]
    any_tool = read(user("q"), tools=tools, tool_choice={"type": "any"})
    assert any_tool.must_call
    assert len(any_tool.tools or []) == 2
    choice = {"type": "tool", "name": "g", "disable_parallel_tool_use": True}
    one_tool = read(user("q"), tools=tools, tool_choice=choice)
    assert one_tool.must_call
    assert one_tool.one_call
    assert [tool["function"]["name"] for tool in one_tool.tools or []] == ["g"]
    assert read(user("q"), tools=tools, tool_choice={"type": "none"}).tools is None
    assert not read(user("q"), tools=tools, tool_choice={"type": "auto"}).must_call
    assert error(user("q"), tool_choice={"type": "any"}).param == "tool_choice"
    unknown = {"type": "tool", "name": "h"}
    assert "named h" in error(user("q"), tools=tools, tool_choice=unknown).message


def test_what_only_the_vendor_understands_is_ignored() -> None:
    read(
        user([text("q") | {"cache_control": {"type": "ephemeral"}}]),
        metadata={"user_id": "u"},
        service_tier="auto",
        context_management={},
        container="c",
        output_config={"effort": "high"},
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ...}, "model"),
        ({"max_tokens": ...}, "max_tokens"),
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [user([{"text": "x"}])]}, "messages.0.content.0.type"),
        ({"messages": [user([{"type": "odd"}])]}, "messages.0.content.0.type"),
        ({"messages": [user([{"type": "text"}])]}, "messages.0.content.0.text"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"system": 5}, "system"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "odd"}}, "tool_choice.type"),
        ({"thinking": {"type": "odd"}}, "thinking.type"),
        (
            {"output_config": {"format": {"type": "json_schema"}}},
            "output_config.format.schema",
        ),
    ],
)
def test_an_error_names_the_field_at_fault(fields: Any, param: str) -> None:
    assert error(user("hi"), **fields).param == param


def test_a_count_needs_no_max_tokens() -> None:
    body = {"model": "m", "messages": [user("hi")]}
    assert read_request(body, counts_only=True).max_tokens is None
