"""Calls that have to be made, or whose arguments have to follow their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from .conftest import ServerProcess, Starter
from .scripted import make_model, say
from .written import as_gemma, as_json, as_xml

SHORT = {"type": "string", "maxLength": 3}
PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 8},
        "limit": {"type": "integer", "minimum": 1, "maximum": 99},
        "mode": {"enum": ["r", "w"]},
        "tags": {
            "type": "array",
            "items": {"type": "string", "maxLength": 3},
            "maxItems": 2,
        },
        "where": {
            "type": "object",
            "properties": {"line": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["line"],
        },
        "note": {"anyOf": [{"type": "string", "pattern": "^x{2}$"}, {"type": "null"}]},
    },
    "required": ["path", "mode", "where"],
    "additionalProperties": False,
}
ARGUMENTS = {
    "path": 'a"b',
    "limit": 3,
    "mode": "w",
    "tags": ["u"],
    "where": {"line": 7},
}
SORTED = dict(sorted(ARGUMENTS.items()))
OTHER = {"type": "object", "properties": {"q": {"type": "boolean"}}, "required": ["q"]}
# What a chat template mentions, by which mlx-lm knows the format of calls.
FORMATS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "json": ("", as_json, ARGUMENTS),
    "xml": ("<tool_call>\n<function=", as_xml, ARGUMENTS),
    "gemma": ("<|tool_call> <tool_call|>", as_gemma, SORTED),
}


def function(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    inner = {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": inner}


TOOLS = [function("open_file", PARAMETERS), function("quit", OTHER)]


@pytest.fixture(scope="module", params=FORMATS)
def served(
    request: pytest.FixtureRequest, start_server: Starter, tmp_path_factory: Any
) -> tuple[ServerProcess, Any, Any]:
    markers, write, arguments = FORMATS[request.param]
    folder = make_model(tmp_path_factory.mktemp(request.param), markers=markers)
    return start_server(folder=folder), write, arguments


def ask(server: ServerProcess, content: str, **fields: Any) -> Any:
    create: Any = server.openai().chat.completions.create
    fields = {"tools": TOOLS, "max_tokens": 400, **fields}
    messages = [{"role": "user", "content": content}]
    (choice,) = create(model="gpt-x", messages=messages, **fields).choices
    return choice


def calls(choice: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls or ()
    ]


def test_a_call_that_follows_its_schema_is_the_models_own(served: Any) -> None:
    server, write, arguments = served
    content = say(write("open_file", arguments))
    for selected in (
        "required",
        {"type": "function", "function": {"name": "open_file"}},
    ):
        choice = ask(server, content, tool_choice=selected)
        assert calls(choice) == [("open_file", arguments)]
        assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("content", ["no", "{}", '{"path": 5}'])
def test_a_model_that_would_not_call_has_to(served: Any, content: str) -> None:
    server, _, _ = served
    no_thought = {"enable_thinking": False}
    choice = ask(
        server,
        say(content),
        tool_choice={"type": "function", "function": {"name": "open_file"}},
        parallel_tool_calls=False,
        extra_body=no_thought,
    )
    if choice.finish_reason != "length":
        ((name, arguments),) = calls(choice)
        assert name == "open_file"
        jsonschema.validate(arguments, PARAMETERS)


def test_arguments_that_do_not_follow_their_schema_cannot_be_written(
    served: Any,
) -> None:
    server, write, arguments = served
    wrong = say(write("open_file", arguments | {"mode": "x", "limit": 0}))
    choice = ask(server, wrong, tool_choice="required", parallel_tool_calls=False)
    if choice.finish_reason != "length":
        ((_, found),) = calls(choice)
        jsonschema.validate(found, PARAMETERS)
    assert '"x"' not in str(choice.message.tool_calls)


def test_a_thought_may_come_before_the_call(served: Any) -> None:
    server, write, arguments = served
    content = say("<think>", "hm", "</think>", "\n\n", write("open_file", arguments))
    choice = ask(server, content, tool_choice="required")
    assert choice.message.reasoning_content == "hm"
    assert calls(choice) == [("open_file", arguments)]


def test_several_calls_may_be_made_unless_only_one_is_wanted(served: Any) -> None:
    server, write, arguments = served
    space = "" if write is as_gemma else "\n"
    content = say(f"{write('open_file', arguments)}{space}{write('quit', {'q': True})}")
    both = ask(server, content, tool_choice="required")
    assert calls(both) == [("open_file", arguments), ("quit", {"q": True})]
    one = ask(server, content, tool_choice="required", parallel_tool_calls=False)
    assert calls(one) == [("open_file", arguments)]


def test_strict_tools_follow_their_schemas_where_a_call_is_made(served: Any) -> None:
    server, write, arguments = served
    strict = [function("open_file", PARAMETERS, strict=True), TOOLS[1]]
    text = ask(server, say("no call"), tools=strict)
    assert text.message.content == "no call"
    right = ask(server, say(f"so: {write('open_file', arguments)}"), tools=strict)
    assert right.message.content.strip() == "so:"
    assert calls(right) == [("open_file", arguments)]
    wrong = say(write("open_file", arguments | {"mode": "x"}))
    choice = ask(server, wrong, tools=strict, parallel_tool_calls=False)
    if choice.finish_reason != "length":
        for _, found in calls(choice):
            jsonschema.validate(found, PARAMETERS)
    assert '"x"' not in str(choice.message.tool_calls)


def test_an_answer_with_a_format_may_be_a_call_instead(served: Any) -> None:
    server, write, arguments = served
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
    }
    layout = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(server, say('{"a": 1}'), response_format=layout)
    assert json.loads(answer.message.content) == {"a": 1}
    choice = ask(server, say(write("open_file", arguments)), response_format=layout)
    assert calls(choice) == [("open_file", arguments)]


def test_messages_enforce_calls_too(served: Any) -> None:
    server, write, arguments = served
    create: Any = server.anthropic().messages.create
    tool = {"name": "open_file", "input_schema": PARAMETERS}
    content = say(write("open_file", arguments))
    for fields in (
        {"tools": [tool], "tool_choice": {"type": "any"}},
        {"tools": [tool], "tool_choice": {"type": "tool", "name": "open_file"}},
        {"tools": [tool | {"strict": True}]},
    ):
        reply = create(
            model="claude-x",
            max_tokens=400,
            messages=[{"role": "user", "content": content}],
            **fields,
        )
        assert reply.stop_reason == "tool_use"
        assert reply.content[-1].input == arguments


def test_responses_enforce_calls_too(served: Any) -> None:
    server, write, arguments = served
    create: Any = server.openai().responses.create
    tool = {"type": "function", "name": "open_file", "parameters": PARAMETERS}
    for fields in (
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool | {"strict": True}]},
    ):
        reply = create(
            model="gpt-x", input=say(write("open_file", arguments)), **fields
        )
        (call,) = (item for item in reply.output if item.type == "function_call")
        assert json.loads(call.arguments) == arguments


def test_a_strict_schema_that_cannot_be_enforced_is_refused(served: Any) -> None:
    server, _, _ = served
    odd = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True}},
    }
    tools = [function("odd", odd, strict=True)]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, say("x"), tools=tools)
    assert "tools.odd.properties.a: Unimplemented keys" in caught.value.message
    assert ask(server, say("x"), tools=[function("odd", odd)]).message.content == "x"


def test_other_formats_are_refused(start_server: Starter, tmp_path: Path) -> None:
    server = start_server(folder=make_model(tmp_path / "m", markers="<arg_key>"))
    for fields in (
        {"tool_choice": "required"},
        {"tools": [function("f", OTHER, strict=True)]},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, say("x"), **fields)
        for name in ("Qwen3", "Qwen3.5", "Gemma-4"):
            assert name in caught.value.message
    assert ask(server, say("x")).message.content == "x"
    create: Any = server.anthropic().messages.create
    with pytest.raises(anthropic.BadRequestError, match=r"tool_choice: .*Gemma-4"):
        create(
            model="claude-x",
            max_tokens=9,
            messages=[{"role": "user", "content": "x"}],
            tools=[{"name": "f", "input_schema": OTHER}],
            tool_choice={"type": "any"},
        )
