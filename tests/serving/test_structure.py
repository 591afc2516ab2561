"""Structured output and budgets for thoughts, by the SDKs of all APIs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.helpers import DEMO

from .conftest import ServerProcess, Starter
from .scripted import say

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
FLAT = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
MESSAGES: list[Any] = [{"role": "user", "content": "def f():"}]
LIMITS = {"max_tokens": 80, "temperature": 0.0}


@pytest.fixture(scope="module", params=[(), ("--mtp",)], ids=["plain", "mtp"])
def demo(
    request: pytest.FixtureRequest, start_server: Starter
) -> Iterator[ServerProcess]:
    server = start_server(*request.param, folder=DEMO)
    yield server
    server.stop()


def chat(server: ServerProcess, **fields: Any) -> Any:
    create: Any = server.openai().chat.completions.create
    return create(model="gpt-x", messages=MESSAGES, **LIMITS | fields)


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "n"} and isinstance(value["n"], int)


def test_chat_follows_a_schema(demo: ServerProcess) -> None:
    for strict in (True, False, None):
        layout = {
            "type": "json_schema",
            "json_schema": {**FORMAT["json_schema"], "strict": strict},
        }
        reply = chat(demo, response_format=layout)
        assert is_valid(reply.choices[0].message.content)
        assert reply.choices[0].finish_reason == "stop"


def test_streams_and_replies_in_one_piece_are_the_same(demo: ServerProcess) -> None:
    whole = chat(demo, response_format=FORMAT).choices[0].message.content
    pieces = chat(demo, response_format=FORMAT, stream=True)
    assert whole == "".join(
        p.choices[0].delta.content or "" for p in pieces if p.choices
    )


def test_chat_gives_any_object(demo: ServerProcess) -> None:
    reply = chat(demo, response_format={"type": "json_object"}, max_tokens=300)
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_what_is_cut_off_says_so(demo: ServerProcess) -> None:
    reply = chat(demo, response_format=FORMAT, max_tokens=4)
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize(
    ("field", "content", "pattern"),
    [
        ("guided_json", SCHEMA, r"\{.*\}"),
        ("guided_json", json.dumps(SCHEMA), r"\{.*\}"),
        ("guided_regex", r"[a-c]{3}\d", r"[a-c]{3}\d"),
        ("guided_grammar", 'root ::= "yes" | "no"', "yes|no"),
        ("guided_choice", ["größe", "tiny"], "größe|tiny"),
        ("structured_outputs", {"regex": "x{3}"}, "xxx"),
        ("structured_outputs", {"json": SCHEMA}, r"\{.*\}"),
    ],
)
def test_vllms_fields(
    demo: ServerProcess, api: str, field: str, content: Any, pattern: str
) -> None:
    if api == "chat":
        text = chat(demo, extra_body={field: content}).choices[0].message.content
    else:
        create: Any = demo.openai().completions.create
        reply = create(
            model="gpt-x", prompt="def f():", extra_body={field: content}, **LIMITS
        )
        text = reply.choices[0].text
    assert re.fullmatch(pattern, text)


def test_responses_follow_a_schema(demo: ServerProcess) -> None:
    create: Any = demo.openai().responses.create
    reply = create(
        model="gpt-x",
        input="def f():",
        text={"format": FLAT},
        max_output_tokens=80,
        temperature=0,
    )
    assert is_valid(reply.output_text)
    assert reply.status == "completed"
    assert reply.text.format.type == "json_schema"


def test_messages_follow_a_schema(demo: ServerProcess) -> None:
    create: Any = demo.anthropic().messages.create
    layout = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_config": {"format": layout}}, {"output_format": layout}):
        reply = create(
            model="gpt-x", messages=MESSAGES, max_tokens=80, extra_body=fields
        )
        assert is_valid(reply.content[0].text)
        assert reply.stop_reason == "end_turn"


def test_several_choices_each_follow_it(demo: ServerProcess) -> None:
    reply = chat(demo, response_format=FORMAT, n=3, temperature=1.0, seed=3)
    assert all(is_valid(choice.message.content) for choice in reply.choices)


def test_log_probabilities_are_json(demo: ServerProcess) -> None:
    reply = chat(demo, response_format=FORMAT, logprobs=True, top_logprobs=5)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in entries)


def test_a_seed_gives_one_text(demo: ServerProcess) -> None:
    texts = {
        chat(demo, response_format=FORMAT, temperature=1.0, seed=5)
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema: Field required",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type: 'xml' is not"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"properties": {"a": {"type": "x"}}}},
                }
            },
            "response_format.json_schema.schema.properties.a: Invalid type: x",
        ),
        ({"guided_regex": "("}, "guided_regex: "),
        ({"guided_regex": 5}, "guided_regex: expected a string"),
        ({"guided_json": "{"}, "guided_json: no JSON"),
        ({"guided_choice": []}, "guided_choice: at least one"),
        (
            {"structured_outputs": {"grammar": "start: x"}},
            "structured_outputs.grammar: ",
        ),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex: not allowed with"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens: -1 is not between"),
    ],
)
def test_mistakes_are_told_with_their_place(
    demo: ServerProcess, fields: Any, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(demo, extra_body=fields)
    assert message in caught.value.message


def test_mistakes_in_messages_are_told(demo: ServerProcess) -> None:
    create: Any = demo.anthropic().messages.create
    layout = {"type": "json_schema", "schema": {"type": "x"}}
    with pytest.raises(
        anthropic.BadRequestError, match=r"output_config\.format\.schema"
    ):
        create(
            model="gpt-x",
            messages=MESSAGES,
            max_tokens=9,
            extra_body={"output_config": {"format": layout}},
        )


def asked(*pieces: str) -> list[Any]:
    return [{"role": "user", "content": say(*pieces)}]


@pytest.fixture(scope="module")
def strict(start_server: Starter, strict_folder: Path) -> ServerProcess:
    """The prompt of its model ends within a thought."""
    return start_server(folder=strict_folder)


@pytest.mark.parametrize("name", ["server", "strict"])
def test_a_thought_comes_before_the_structure(
    name: str, request: pytest.FixtureRequest
) -> None:
    server: ServerProcess = request.getfixturevalue(name)
    start = "<think>" if name == "server" else ""
    create: Any = server.openai().chat.completions.create
    for answer in ('{"name": "Bo", "n": 7}', "what is no JSON"):
        reply = create(
            model="gpt-x",
            messages=asked(start, "let me see", "</think>", "\n\n", answer),
            response_format=FORMAT,
            max_tokens=120,
        )
        (choice,) = reply.choices
        assert choice.message.reasoning_content == "let me see"
        assert reply.usage.completion_tokens_details.reasoning_tokens >= 10
        assert choice.message.content.startswith('{"name": "')
        if answer.startswith("{"):
            assert choice.message.content == answer


BUDGETS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"max_thinking_tokens": 4}),
    ("chat", {"thinking_budget": 4}),
    ("chat", {"thinking": {"type": "enabled", "budget_tokens": 4}}),
    ("chat", {"reasoning": {"max_tokens": 4}}),
    ("chat", {"reasoning_effort": "high", "max_thinking_tokens": 4}),
    ("responses", {"max_thinking_tokens": 4}),
    ("responses", {"reasoning": {"effort": "low", "max_tokens": 4}}),
    ("messages", {"thinking": {"type": "enabled", "budget_tokens": 4}}),
]


@pytest.mark.parametrize(("api", "fields"), BUDGETS)
def test_a_thought_ends_with_its_budget(
    strict: ServerProcess, api: str, fields: dict[str, Any]
) -> None:
    messages = asked("abcdefghijkl", "</think>", "\n\n", "answer")
    create: Any
    if api == "chat":
        create = strict.openai().chat.completions.create
        reply = create(model="gpt-x", messages=messages, extra_body=fields)
        thought = reply.choices[0].message.reasoning_content
        answer = reply.choices[0].message.content
        number = reply.usage.completion_tokens_details.reasoning_tokens
    elif api == "responses":
        create = strict.openai().responses.create
        reply = create(model="gpt-x", input=messages, extra_body=fields)
        thought, answer = reply.output[0].content[0].text, reply.output_text
        number = reply.usage.output_tokens_details.reasoning_tokens
    else:
        create = strict.anthropic().messages.create
        reply = create(
            model="gpt-x", messages=messages, max_tokens=90, extra_body=fields
        )
        thought, answer = reply.content[0].thinking, reply.content[1].text
        number = reply.usage.output_tokens_details.thinking_tokens
    assert thought == "abcd"
    # The marker that ends the thought is counted with it.
    assert number == 5
    # The scripted model begins again where its script is not followed.
    assert answer.startswith("abcdefghijkl")


def test_a_budget_that_is_not_reached_changes_nothing(strict: ServerProcess) -> None:
    create: Any = strict.openai().chat.completions.create
    texts = {
        create(
            model="gpt-x",
            messages=asked("abc", "</think>", "\n\n", "answer"),
            extra_body=fields,
        )
        .choices[0]
        .message.content
        for fields in ({}, {"max_thinking_tokens": 4}, {"reasoning_effort": "low"})
    }
    assert len(texts) == 1


def test_a_budget_and_a_structure_go_together(strict: ServerProcess) -> None:
    create: Any = strict.openai().chat.completions.create
    reply = create(
        model="gpt-x",
        messages=asked("abcdefghijkl", "</think>", "\n\n", "answer"),
        response_format=FORMAT,
        max_tokens=60,
        extra_body={"max_thinking_tokens": 4},
    )
    message = reply.choices[0].message
    assert message.reasoning_content == "abcd"
    assert message.content.startswith('{"name": "')
