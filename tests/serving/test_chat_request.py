"""What chat completions and completions are read as."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_optiq_ext.grammars import Source
from mlx_optiq_ext.serving._completions import (
    read_chat_request,
    read_completion_request,
)
from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._prompt import with_one_system_message
from mlx_optiq_ext.serving._request import Request

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def read(*messages: Any, **fields: Any) -> Request:
    return read_chat_request({"messages": [*(messages or [user("q")])]} | fields)


def error(*messages: Any, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        read(*messages, **fields)
    assert caught.value.status == 400
    return caught.value


def call_with(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function"}
    call["function"] = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_null_counts_as_absent() -> None:
    names = (
        "max_completion_tokens",
        "max_tokens",
        "model",
        "n",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "stop",
        "stream",
        "stream_options",
        "tool_choice",
        "tools",
        "top_logprobs",
        "logprobs",
    )
    request = read(**dict.fromkeys(names))
    plain = read()
    assert request.body != plain.body
    request.body = plain.body
    assert request == plain


def test_messages_are_passed_on_as_they_are() -> None:
    messages = [
        system("s"),
        user([{"type": "text", "text": "a"}]),
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
        {"role": "tool", "tool_call_id": "1", "content": "d"},
        user("e") | {"name": "n"},
    ]
    assert read(*messages).messages == messages


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"x": 1}', {"x": 1}),
        ({"x": 1}, {"x": 1}),
        ("", {}),
        (None, {}),
        ("null", {}),
        ('"{\\"x\\": 1}"', {"x": 1}),
        ('{"x": "1', {"arguments": '{"x": "1'}),
        ("[1]", {"arguments": "[1]"}),
        ('"abc"', {"arguments": '"abc"'}),
    ],
)
def test_arguments_in_the_history_are_objects(arguments: Any, expected: Any) -> None:
    message = read(user("q"), call_with(arguments)).messages[1]
    assert message["tool_calls"][0]["function"]["arguments"] == expected


def test_what_is_wrong_in_the_history_is_named() -> None:
    place = "messages.1.tool_calls.0.function.arguments"
    assert error(user("q"), call_with(5)).param == place
    assert error(user("q"), {"role": "assistant", "tool_calls": [{}]}).param == (
        "messages.1.tool_calls.0.function"
    )
    assert error(user([{"type": "video"}])).param == "messages.0.content.0.type"


def test_a_thought_that_is_sent_back_is_one() -> None:
    message = {"role": "assistant", "content": "a", "reasoning": "hm"}
    assert read(user("q"), message).messages[1]["reasoning_content"] == "hm"


def test_the_billing_line_is_left_out() -> None:
    text = "x-anthropic-billing-header: v; cch=1;\nBe brief."
    assert read(system(text), user("q")).messages[0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        ("auto", ["f", "g"], False),
        ("none", [], False),
        ("required", ["f", "g"], True),
        ({"type": "function", "function": {"name": "g"}}, ["g"], True),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "g"}}],
                },
            },
            ["g"],
            False,
        ),
    ],
)
def test_the_choice_of_a_tool(choice: Any, names: list[str], must_call: bool) -> None:
    request = read(tools=[TOOL, OTHER], tool_choice=choice)
    assert [tool["function"]["name"] for tool in request.tools or []] == names
    assert request.must_call is must_call


def test_a_choice_of_a_tool_that_is_none() -> None:
    named = {"type": "function", "function": {"name": "h"}}
    assert error(tools=[TOOL], tool_choice=named).param == "tool_choice"
    assert error(tool_choice="required").param == "tool_choice"
    assert error(tools=[TOOL], tool_choice="always").param == "tool_choice"


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
    ],
)
def test_what_would_change_the_reply_is_refused(fields: dict[str, Any]) -> None:
    assert error(**fields).code == "unsupported_parameter"


def test_effort_and_thinking() -> None:
    assert read().has_thinking is None
    assert read(reasoning_effort="none").has_thinking is False
    assert read(reasoning={"effort": "high"}).has_thinking is True
    assert read(reasoning_effort="low").template == {"reasoning_effort": "low"}
    assert read(thinking={"type": "disabled"}).has_thinking is False
    assert read(enable_thinking=False).has_thinking is False
    assert error(reasoning_effort="much").param == "reasoning_effort"


def test_lengths_by_all_their_names() -> None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        assert read(**{name: 7}).max_tokens == 7
        assert error(**{name: 0}).param == name
    assert read(max_completion_tokens=3, max_tokens=9).max_tokens == 3


def test_the_number_of_replies_is_limited() -> None:
    assert read(n=8).num_choices == 8
    for wrong in (0, 9, 1.5, "2", True):
        assert error(n=wrong).param == "n"


def test_log_probabilities() -> None:
    assert read(top_logprobs=20).num_top_logprobs == 20
    assert read(logprobs=True).gives_logprobs
    assert not read(top_logprobs=-1).gives_logprobs
    assert error(top_logprobs=21).param == "top_logprobs"
    asked = read_completion_request({"prompt": "x", "logprobs": 3})
    assert (asked.gives_logprobs, asked.num_top_logprobs) == (True, 3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("abc", "abc"), (["abc"], "abc"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])],
)
def test_a_prompt_is_a_text_or_tokens(prompt: Any, expected: Any) -> None:
    assert read_completion_request({"prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": 5},
        {"prompt": ["a", "b"]},
        {"prompt": [1, "b"]},
        {"prompt": "x", "echo": True},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "best_of": 2},
    ],
)
def test_completions_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(APIError) as caught:
        read_completion_request(fields)
    assert caught.value.status == 400


def test_a_template_that_takes_one_system_message_gets_one() -> None:
    messages = [
        system("a"),
        {"role": "developer", "content": "b"},
        user("q"),
        {"role": "assistant", "content": "r"},
        system("c"),
        user("s"),
    ]
    assert with_one_system_message(messages) == [
        system("a\n\nb"),
        user("q"),
        {"role": "assistant", "content": "r"},
        user("c\ns"),
    ]


def test_the_format_of_the_answer() -> None:
    schema = {"type": "array"}
    inner = {"name": "x", "schema": schema, "strict": True}
    request = read(response_format={"type": "json_schema", "json_schema": inner})
    assert request.answer == Source("json_schema", schema, is_strict=True)
    assert request.answer_path == "response_format.json_schema.schema"
    assert read(response_format={"type": "text"}).answer is None
    any_object = read(response_format={"type": "json_object"}).answer
    assert any_object is not None
    assert any_object.content == {"type": "object"}
    for wrong in ({}, {"type": "json_schema"}, {"type": "yaml"}, "json"):
        assert error(response_format=wrong).status == 400


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "max"}, None),
        ({"reasoning_effort": "low", "max_thinking_tokens": 7}, 7),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, 0),
        ({"reasoning": {"max_tokens": 5, "effort": "high"}}, 5),
        ({"thinking_budget": 6}, 6),
    ],
)
def test_the_budget_for_thoughts(fields: dict[str, Any], limit: int | None) -> None:
    assert read(**fields).max_thinking_tokens == limit
