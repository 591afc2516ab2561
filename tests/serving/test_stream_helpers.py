"""The helpers of the official clients, and the streams that they are made from."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from .conftest import TIMEOUT, ServerProcess, Starter
from .scripted import call, say
from .test_faults import FAST_KEEP_ALIVE
from .wire import post


class Add(pydantic.BaseModel):
    """Adds two numbers."""

    a: int
    b: int


TEXT = f"<think>\nhm\n</think>\n\nso{call('Add', {'a': 1, 'b': 2})}"
CHAT_TOOL: Any = openai.pydantic_function_tool(Add)
RESPONSES_TOOL: Any = {"type": "function", **CHAT_TOOL["function"]}
MESSAGES_TOOL: Any = {"name": "Add", "input_schema": Add.model_json_schema()}


@pytest.fixture(scope="module")
def chat(server: ServerProcess) -> openai.OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def messages(server: ServerProcess) -> anthropic.Anthropic:
    return server.anthropic()


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def for_chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-x", "messages": user(text), "tools": [CHAT_TOOL]} | fields


def for_responses(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-x", "input": text, "tools": [RESPONSES_TOOL]} | fields


def for_messages(text: str, **fields: Any) -> dict[str, Any]:
    asked = {"model": "claude-x", "messages": user(text), "max_tokens": 900}
    return asked | {"tools": [MESSAGES_TOOL]} | fields


# Structured: events and arguments as objects of the client's own.


def test_chat_completions_are_structured(chat: openai.OpenAI) -> None:
    with chat.chat.completions.stream(**for_chat(say(TEXT))) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done"} <= kinds
    names = "tool_calls.function.arguments"
    pieces = [e.arguments_delta for e in events if e.type == f"{names}.delta"]
    (done,) = [event for event in events if event.type == f"{names}.done"]
    assert "".join(pieces) == done.arguments
    (asked,) = final.choices[0].message.tool_calls or ()
    assert asked.function.parsed_arguments == Add(a=1, b=2)
    parsed = chat.chat.completions.parse(**for_chat(say(TEXT)))
    (asked,) = parsed.choices[0].message.tool_calls or ()
    assert asked.function.parsed_arguments == Add(a=1, b=2)


def test_responses_are_structured(chat: openai.OpenAI) -> None:
    with chat.responses.stream(**for_responses(say(TEXT))) as stream:
        pieces = [
            event.snapshot
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        final = stream.get_final_response()
    assert json.loads(pieces[-1]) == {"a": 1, "b": 2}
    for response in (final, chat.responses.parse(**for_responses(say(TEXT)))):
        assert response.output_text.strip() == "so"
        assert response.output[-1].parsed_arguments == {"a": 1, "b": 2}


def test_a_stored_response_is_found_by_the_helper(chat: openai.OpenAI) -> None:
    with chat.responses.stream(**for_responses(say("one"))) as stream:
        first = stream.get_final_response()
    more = for_responses(say("two"), previous_response_id=first.id)
    with chat.responses.stream(**more) as stream:
        assert stream.get_final_response().output_text == "two"
    assert chat.responses.retrieve(first.id).output_text == "one"


@pytest.mark.parametrize("is_beta", [False, True])
def test_messages_are_structured(
    messages: anthropic.Anthropic, *, is_beta: bool
) -> None:
    resource: Any = messages.beta.messages if is_beta else messages.messages
    with resource.stream(**for_messages(say(TEXT), thinking={"type": "adaptive"})) as s:
        events = list(s)
        final = s.get_final_message()
    kinds = [event.type for event in events]
    for kind in ("thinking", "signature", "text", "input_json", "message_stop"):
        assert kind in kinds
    (done,) = [e for e in events if e.type == "input_json" and e.snapshot][-1:]
    assert done.snapshot == {"a": 1, "b": 2}
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[-1].input == {"a": 1, "b": 2}


def test_a_runner_of_tools_goes_on_until_there_is_an_answer(
    messages: anthropic.Anthropic,
) -> None:
    sums = []

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Adds.

        Args:
            a: One.
            b: Another.
        """
        sums.append(a + b)
        return say(f"It is {a + b}.")

    asked = for_messages(say(call("add", {"a": 1, "b": 2})), tools=[add])
    final = messages.beta.messages.tool_runner(**asked).until_done()
    assert sums == [3]
    assert final.content[0].text == "It is 3."


# Raw: the same requests, put together by hand.


def test_raw_chat_completions_add_up(chat: openai.OpenAI) -> None:
    whole = chat.chat.completions.create(**for_chat(say(TEXT))).choices[0]
    with chat.chat.completions.create(**for_chat(say(TEXT)), stream=True) as chunks:
        deltas = [chunk.choices[0].delta for chunk in chunks]
    text = "".join(delta.content or "" for delta in deltas)
    assert text == whole.message.content
    pieces = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    (asked,) = whole.message.tool_calls or ()
    joined = "".join(piece.function.arguments or "" for piece in pieces)
    assert joined == asked.function.arguments
    assert [bool(piece.id) for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_raw_completions_add_up(chat: openai.OpenAI) -> None:
    asked: Any = {"model": "gpt-x", "prompt": say("so", " it goes")}
    chunks = list(chat.completions.create(**asked, stream=True))
    whole = chat.completions.create(**asked).choices[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    options: Any = {"include_usage": True}
    *_, last = chat.completions.create(**asked, stream=True, stream_options=options)
    assert last.usage is not None
    assert last.choices == []


def test_raw_responses_add_up(chat: openai.OpenAI) -> None:
    events = list(chat.responses.create(**for_responses(say(TEXT)), stream=True))
    final = events[-1].response
    for kind, expected in (
        ("output_text", final.output_text),
        ("function_call_arguments", final.output[-1].arguments),
        ("reasoning_text", final.output[0].content[0].text),
    ):
        name = f"response.{kind}.delta"
        assert "".join(e.delta for e in events if e.type == name) == expected


def test_raw_messages_add_up(messages: anthropic.Anthropic) -> None:
    asked = for_messages(say(TEXT), thinking={"type": "adaptive"})
    whole = messages.messages.create(**asked)
    found = {"thinking": "", "text": "", "partial_json": ""}
    for event in messages.messages.create(**asked, stream=True):
        if event.type == "content_block_delta":
            for name in found:
                found[name] += getattr(event.delta, name, "")
    thought, text, asked_for = whole.content
    assert found["thinking"] == thought.thinking
    assert found["text"] == text.text
    assert json.loads(found["partial_json"]) == asked_for.input


def test_replies_are_there_in_their_own_words(
    server: ServerProcess, chat: openai.OpenAI
) -> None:
    raw = chat.chat.completions.with_raw_response.create(**for_chat(say(TEXT)))
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().choices[0].finish_reason == "tool_calls"
    with chat.responses.with_streaming_response.create(
        **for_responses(say("ab")), stream=True
    ) as reply:
        lines = list(reply.iter_lines())
    assert lines[0] == "event: response.created"
    client = server.anthropic()
    answer = client.messages.with_raw_response.create(**for_messages(say("ab")))
    assert answer.headers["request-id"].startswith("req_")
    assert answer.parse().content[0].text == "ab"


def test_clients_that_wait_for_several_things(server: ServerProcess) -> None:
    options: Any = {"api_key": "none", "timeout": TIMEOUT, "max_retries": 0}
    openais = openai.AsyncOpenAI(base_url=f"{server.url}/v1", **options)
    anthropics = anthropic.AsyncAnthropic(base_url=server.url, **options)

    async def ask_messages() -> str:
        async with anthropics.messages.stream(**for_messages(say("one"))) as stream:
            return await stream.get_final_text()

    async def ask_responses() -> str:
        async with openais.responses.stream(**for_responses(say("two"))) as stream:
            return (await stream.get_final_response()).output_text

    async def ask_chat() -> str | None:
        async with openais.chat.completions.stream(**for_chat(say("three"))) as stream:
            final = await stream.get_final_completion()
        return final.choices[0].message.content

    async def ask_all() -> list[Any]:
        return await asyncio.gather(ask_messages(), ask_responses(), ask_chat())

    assert asyncio.run(ask_all()) == ["one", "two", "three"]


# Several replies and log probabilities.


def test_several_replies_keep_the_connection_alive(start_server: Starter) -> None:
    server = start_server(start=FAST_KEEP_ALIVE)
    asked = for_chat(say("ab", sleep=0.5, prefill_sleep=0.5), n=3)
    with server.openai().chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["ab"] * 3
    reply = post(server, "/v1/chat/completions", {**asked, "stream": True})
    assert b": keep-alive\n\n" in reply.data
    assert len(reply.events) == 3 * 3


def test_log_probabilities_of_responses(chat: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    asked = for_responses(say("<think>hm</think>\n\nab"), include=include)
    asked |= {"top_logprobs": 3}
    whole = chat.responses.create(**asked)
    (entries,) = [i.content[0].logprobs for i in whole.output if i.type == "message"]
    text = "".join(entry.token for entry in entries)
    assert text.removesuffix("<|im_end|>").strip() == "ab"
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        likely = [each.logprob for each in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True)
    with chat.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    streamed = [entry.token for event in deltas for entry in event.logprobs]
    assert streamed == [entry.token for entry in entries]
    plain = chat.responses.create(**for_responses(say("ab")))
    assert plain.output[0].content[0].logprobs == []
