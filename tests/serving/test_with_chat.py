"""The official client of OpenAI on chat completions and completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from .conftest import ServerProcess, Starter
from .scripted import call, say

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object"}},
}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def strict(start_server: Starter, strict_folder: Path) -> openai.OpenAI:
    """The client of a server whose template takes one system message."""
    return start_server(folder=strict_folder).openai()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def request(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-x", "messages": [user(text)], "max_tokens": 900} | fields


def calls_of(message: Any) -> list[Any]:
    return [
        (each.function.name, each.function.arguments)
        for each in message.tool_calls or []
    ]


def both(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    """The choice that comes in one piece, which the streamed one has to equal."""
    asked = request(text, **fields)
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == whole.message.content
    assert calls_of(streamed.message) == calls_of(whole.message)
    assert streamed.finish_reason == whole.finish_reason
    return whole


def test_a_thought_a_text_and_calls(client: openai.OpenAI) -> None:
    reply = f"<think>hm</think>\n\na{call('f', {'x': 1})}{call('f', {})}"
    choice = both(client, say(reply), tools=[TOOL])
    assert choice.message.reasoning == choice.message.reasoning_content == "hm"
    assert choice.message.content == "\n\na"
    assert calls_of(choice.message) == [("f", '{"x": 1}'), ("f", "{}")]
    assert choice.finish_reason == "tool_calls"


def test_a_call_without_tools_is_text(client: openai.OpenAI) -> None:
    choice = both(client, say(call("f", {})))
    assert choice.message.content == call("f", {})
    assert choice.finish_reason == "stop"


def test_a_call_with_parameters_keeps_them(client: openai.OpenAI) -> None:
    reply = call("f", {"x": 1}).replace("arguments", "parameters")
    choice = both(client, say(reply), tools=[TOOL])
    assert calls_of(choice.message) == [("f", '{"x": 1}')]


@pytest.mark.parametrize("reply", ["<tool_call>hello</tool_call>", "<tool_call>[1,2]"])
def test_what_is_no_call_is_text(client: openai.OpenAI, reply: str) -> None:
    choice = both(client, say(reply), tools=[TOOL])
    assert choice.message.content.startswith("<tool_call>")
    assert not choice.message.tool_calls
    assert choice.finish_reason != "tool_calls"


def test_a_call_that_is_cut_off_is_no_end(client: openai.OpenAI) -> None:
    text = say(call("f", {"text": "a" * 100}))
    asked = request(text, tools=[TOOL], max_tokens=60)
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "length"
    ended = request(say('<tool_call>{"name": "f", "arguments": {"x'), tools=[TOOL])
    choice = client.chat.completions.create(**ended).choices[0]
    assert choice.finish_reason == "length"
    assert calls_of(choice.message) == [("f", '{"x')]
    with (
        pytest.raises(openai.LengthFinishReasonError),
        client.chat.completions.stream(**ended) as stream,
    ):
        stream.get_final_completion()


@pytest.mark.parametrize("pieces", [("one STOP two",), ("one S", "TOP two")])
def test_a_stop_sequence_ends_the_text(client: openai.OpenAI, pieces: Any) -> None:
    choice = both(client, say(*pieces), stop=["TOP", "zzz"])
    assert choice.message.content == "one S"
    assert choice.finish_reason == "stop"
    prompt = say(*pieces)
    text = client.completions.create(model="gpt-x", prompt=prompt, stop="TOP")
    assert text.choices[0].text == "one S"


def test_a_stop_sequence_in_arguments_ends_nothing(client: openai.OpenAI) -> None:
    choice = both(client, say(call("f", {"x": "a STOP b"})), tools=[TOOL], stop="STOP")
    assert calls_of(choice.message) == [("f", '{"x": "a STOP b"}')]


def test_tools_that_may_not_be_called_are_not_offered(client: openai.OpenAI) -> None:
    text = say(call("f", {}))
    plain = client.chat.completions.create(**request(text))
    fields = request(text, tools=[TOOL], tool_choice="none")
    none = client.chat.completions.create(**fields)
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert not none.choices[0].message.tool_calls


def test_a_call_can_be_forced_and_be_the_only_one(client: openai.OpenAI) -> None:
    forced = say(call("f", {}))
    choice = both(client, forced, tools=[TOOL], tool_choice="required")
    assert calls_of(choice.message) == [("f", "{}")]
    two = say(call("f", {"x": 1}) + call("f", {}))
    choice = both(client, two, tools=[TOOL], parallel_tool_calls=False)
    assert calls_of(choice.message) == [("f", '{"x": 1}')]


def test_the_stream_helper_finds_the_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    with client.chat.completions.stream(
        **request(say("abc")), stream_options=options
    ) as stream:
        assert stream.get_final_completion().usage.completion_tokens == 4


def test_several_replies_share_a_prompt(client: openai.OpenAI) -> None:
    asked = request(say("several"), n=3)
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {"several"}
    assert whole.usage.completion_tokens == 3 * 8
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1, 2}


def test_log_probabilities_are_streamed_too(client: openai.OpenAI) -> None:
    asked = request(say("abc"), logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [
        entry for chunk in chunks for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole
    assert [entry.token for entry in whole] == ["a", "b", "c", "<|im_end|>"]
    for entry in whole:
        likely = [each.logprob for each in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert entry.top_logprobs[0].token == entry.token


def test_log_probabilities_of_completions(client: openai.OpenAI) -> None:
    asked = {"model": "gpt-x", "prompt": say("ab"), "logprobs": 2}
    logprobs = client.completions.create(**asked).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "<|im_end|>"]
    assert logprobs.text_offset == [0, 1, 2]
    assert [len(each) for each in logprobs.top_logprobs] == [2, 2, 2]


def test_tokens_and_what_drafted_them(client: openai.OpenAI) -> None:
    extra = {"token_sources": True}
    whole = client.chat.completions.create(**request(say("ab")), extra_body=extra)
    assert "".join(each["text"] for each in whole.token_sources) == "ab"
    chunks = client.chat.completions.create(
        **request(say("ab")), extra_body=extra, stream=True
    )
    assert [s for chunk in chunks for s in chunk.token_sources] == whole.token_sources
    plain = client.chat.completions.create(**request(say("ab")))
    assert not hasattr(plain, "token_sources")


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request("x" * 5000))
    assert caught.value.code == "context_length_exceeded"


def test_null_fields(client: openai.OpenAI) -> None:
    names = ("max_tokens", "temperature", "top_p", "stream", "logprobs", "model", "n")
    body = request(say("ok")) | dict.fromkeys(names)
    choice = client.post("/chat/completions", body=body, cast_to=object)["choices"][0]
    assert choice["message"]["content"] == "ok"


@pytest.mark.parametrize("role", ["developer", "system"])
def test_system_messages_anywhere(strict: openai.OpenAI, role: str) -> None:
    said = say("</think>\n\nok")
    for messages in (
        [{"role": role, "content": "A"}, user(said)],
        [
            {"role": "system", "content": "A"},
            {"role": role, "content": "B"},
            user(said),
        ],
        [
            {"role": "system", "content": "A"},
            user("q"),
            {"role": "assistant", "content": "a"},
            {"role": role, "content": "B"},
            user(said),
        ],
    ):
        asked = request("", messages=messages)
        reply = strict.chat.completions.create(**asked)
        assert reply.choices[0].message.content == "\n\nok"


@pytest.mark.parametrize("arguments", ["", "{}", '{"x": "1', "[1]", '"{}"', {"x": 1}])
def test_arguments_in_the_history(strict: openai.OpenAI, arguments: Any) -> None:
    function = {"name": "f", "arguments": arguments}
    called = {"id": "1", "type": "function", "function": function}
    messages = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": say("</think>ok")},
    ]
    asked = request("", messages=messages, tools=[TOOL])
    reply = strict.chat.completions.create(**asked)
    assert reply.choices[0].message.content == "ok"


def test_a_seed_and_a_penalty_with_a_warm_cache(start_server: Starter) -> None:
    from tests.helpers import DEMO

    client = start_server(folder=DEMO).openai()
    asked: dict[str, Any] = {
        "model": "gpt-x",
        "prompt": "the sea the king the sea the king of the sea, my lord, and",
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": {"repetition_penalty": 1.5},
    }
    cold = client.completions.create(**asked, seed=7).choices[0].text
    client.completions.create(**asked)
    warm = client.completions.create(**asked, seed=7)
    assert warm.usage.prompt_tokens_details.cached_tokens > 0
    assert warm.choices[0].text == cold


def test_a_streamed_call_comes_in_pieces(client: openai.OpenAI) -> None:
    text = say(call("f", {"text": "a" * 100}))
    asked = request(text, tools=[TOOL], stream=True)
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked)]
    pieces = [d.tool_calls[0].function.arguments for d in deltas if d.tool_calls]
    assert len(pieces) > 40
    assert json.loads("".join(pieces)) == {"text": "a" * 100}
