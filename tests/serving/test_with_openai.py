"""The official client of OpenAI against a real server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest

from .conftest import ServerProcess
from .scripted import MAX_POSITIONS, call, say

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "apply_patch", "description": "d"}
MCP = {"type": "namespace", "name": "mcp", "description": "d", "tools": [TOOL]}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return server.openai()


def request(value: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-x", "input": value, "max_output_tokens": 500} | fields


def run_stream(client: openai.OpenAI, value: Any, **fields: Any) -> Any:
    """The events of a stream, and the response of the last."""
    with client.responses.stream(**request(value, **fields)) as stream:
        events = [*stream]
    return events, events[-1].response


def output(response: Any) -> list[Any]:
    shown = {
        "message": lambda item: item.content[0].text,
        "reasoning": lambda item: ("thinking", item.content[0].text),
        "function_call": lambda item: (item.name, json.loads(item.arguments)),
        "custom_tool_call": lambda item: (item.name, item.input),
    }
    return [shown[item.type](item) for item in response.output]


def both(client: openai.OpenAI, value: Any, **fields: Any) -> Any:
    """The response that comes in one piece, which the streamed one has to equal."""
    whole = client.responses.create(**request(value, **fields))
    _, streamed = run_stream(client, value, **fields)
    assert output(streamed) == output(whole)
    assert streamed.status == whole.status
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    return whole


def test_thoughts_texts_and_calls_in_order(client: openai.OpenAI) -> None:
    reply = f"<think>hm</think>\n\nfirst{call('f', {'x': 1})}second{call('f', {})}"
    response = both(client, say(reply), tools=[TOOL])
    assert output(response) == [
        ("thinking", "hm"),
        "first",
        ("f", {"x": 1}),
        "second",
        ("f", {}),
    ]
    assert response.status == "completed"
    assert response.model == "gpt-x"


def test_a_stream_numbers_its_events_and_ends_with_the_response(
    client: openai.OpenAI,
) -> None:
    events, response = run_stream(client, say("abc"))
    numbers = [event.sequence_number for event in events]
    assert numbers == [*range(len(events))]
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    kept = client.responses.retrieve(response.id)
    assert kept.to_dict() == response.model_dump(exclude_unset=True) | kept.to_dict()
    assert output(kept) == ["abc"]


def test_arguments_survive_the_way(client: openai.OpenAI) -> None:
    arguments = {"text": 'ü "q" \\ 😀\n', "deep": {"list": [1, None, {"x": True}]}}
    response = both(client, say(call("f", arguments)), tools=[TOOL])
    assert output(response) == [("f", arguments)]


def test_the_arguments_of_a_call_are_streamed_as_they_are_written(
    client: openai.OpenAI,
) -> None:
    arguments = {"text": "a" * 40 + 'ü "q"\n', "y": [1, {}]}
    events, response = run_stream(client, say(call("f", arguments)), tools=[TOOL])
    kind = "response.function_call_arguments.delta"
    pieces = [event.delta for event in events if event.type == kind]
    assert len(pieces) > 40
    assert "".join(pieces) == response.output[0].arguments
    assert json.loads(response.output[0].arguments) == arguments


def test_a_streamed_call_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    reply = say(call("f", {"text": "a" * 100}))
    stream = client.responses.create(
        **request(reply, tools=[TOOL], max_output_tokens=60), stream=True
    )
    response = [*stream][-1].response
    assert response.status == "incomplete"
    assert response.output[0].status == "incomplete"
    assert response.output[0].arguments.startswith('{"text": "aaaa')


def test_a_malformed_call_is_shown(client: openai.OpenAI) -> None:
    response = both(client, say("<tool_call>{bad</tool_call>"), tools=[TOOL])
    assert output(response) == ["<tool_call>{bad</tool_call>"]


def test_free_form_tools_and_namespaces_make_the_round_trip(
    client: openai.OpenAI,
) -> None:
    reply = call("apply_patch", {"input": "*** x"}) + call("mcp__f", {"y": 2})
    tools = [PATCH, MCP]
    response = both(client, say(reply), tools=tools)
    assert output(response) == [("apply_patch", "*** x"), ("f", {"y": 2})]
    assert response.output[1].namespace == "mcp"
    history = [item.to_dict() for item in response.output]
    outputs = [
        {
            "type": "custom_tool_call_output",
            "call_id": history[0]["call_id"],
            "output": "ok",
        },
        {
            "type": "function_call_output",
            "call_id": history[1]["call_id"],
            "output": [{"type": "input_text", "text": "ok"}],
        },
    ]
    items = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": "go"},
        {"type": "reasoning", "summary": [], "encrypted_content": None},
        *history,
        *outputs,
        {"role": "user", "content": say("done")},
    ]
    again = both(client, items, tools=tools, store=False)
    assert output(again) == ["done"]


def test_a_chain_of_responses_with_tools(client: openai.OpenAI) -> None:
    first = client.responses.create(
        **request(say(call("f", {})), tools=[TOOL], instructions="old")
    )
    result = {
        "type": "function_call_output",
        "call_id": first.output[0].call_id,
        "output": "42",
    }
    text = {"role": "user", "content": say("so 42")}
    second = client.responses.create(
        **request([result, text], tools=[TOOL], previous_response_id=first.id)
    )
    assert output(second) == ["so 42"]
    assert second.previous_response_id == first.id
    assert second.instructions is None
    items = [*client.responses.input_items.list(second.id, order="asc")]
    kinds = ["message", "function_call", "function_call_output", "message"]
    assert [item.type for item in items] == kinds
    third = client.responses.create(
        **request(say("third"), previous_response_id=second.id, instructions="new")
    )
    assert output(third) == ["third"]


def test_the_chain_is_what_the_whole_conversation_would_be(
    client: openai.OpenAI,
) -> None:
    first = client.responses.create(**request(say("one")))
    chained = client.responses.input_tokens.count(
        model="gpt-x", input="next", previous_response_id=first.id
    )
    whole = client.responses.input_tokens.count(
        model="gpt-x",
        input=[
            {"role": "user", "content": say("one")},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "next"},
        ],
    )
    assert chained.input_tokens == whole.input_tokens


def test_what_is_not_stored_cannot_be_asked_for(client: openai.OpenAI) -> None:
    response = client.responses.create(**request(say("x"), store=False))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**request("x", previous_response_id=response.id))
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_a_deleted_response_is_gone(client: openai.OpenAI) -> None:
    response = client.responses.create(**request(say("x")))
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    for action in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError):
            action(response.id)


def test_an_incomplete_response(client: openai.OpenAI) -> None:
    events, response = run_stream(client, say("<think>abcdef"), max_output_tokens=4)
    assert events[-1].type == "response.incomplete"
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert output(response) == [("thinking", "abc")]
    kept = client.responses.retrieve(response.id)
    assert kept.status == "incomplete"
    assert output(kept) == output(response)


def test_an_empty_reply(client: openai.OpenAI) -> None:
    response = both(client, say(""))
    assert response.output == []
    assert response.output_text == ""


def test_characters_of_several_tokens(client: openai.OpenAI) -> None:
    text = "ü€😀👩‍👩‍👧 日本"
    events, response = run_stream(client, say(text))
    deltas = [event.delta for event in events if "text.delta" in event.type]
    assert "".join(deltas) == text
    assert all("�" not in delta for delta in deltas)
    assert response.output_text == text


def test_usage_adds_up_to_the_count(client: openai.OpenAI) -> None:
    value = say("abc") + " never said before"
    count = client.responses.input_tokens.count(model="gpt-x", input=value)
    assert count.object == "response.input_tokens"
    usage = client.responses.create(**request(value)).usage
    assert usage.input_tokens == count.input_tokens
    assert usage.output_tokens == 4
    assert usage.total_tokens == count.input_tokens + 4
    again = client.responses.create(**request(value)).usage
    assert again.input_tokens == count.input_tokens
    assert again.input_tokens_details.cached_tokens > count.input_tokens / 2


def test_a_forced_call_leaves_the_model_no_choice(client: openai.OpenAI) -> None:
    value = say(call("f", {"x": 1}))
    for choice in ("required", {"type": "function", "name": "f"}):
        response = both(client, value, tools=[TOOL], tool_choice=choice)
        assert output(response) == [("f", {"x": 1})]


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        value: int

    said = request(say('{"value": 7}'))
    response = client.responses.parse(**said, text_format=Answer)
    assert response.output_parsed == Answer(value=7)


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    value = "x " * MAX_POSITIONS
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**request(value))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        run_stream(client, value)
    assert caught.value.code == "context_length_exceeded"


def test_concurrent_streams_do_not_mix(client: openai.OpenAI) -> None:
    def run(text: str) -> tuple[str, str]:
        _, response = run_stream(client, say(text, sleep=0.005))
        return response.id, response.output_text

    texts = [letter * 20 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(run, texts)]
    assert [text for _, text in found] == texts
    assert len({name for name, _ in found}) == 4


def test_an_exception_within_a_stream_is_a_failed_response(
    client: openai.OpenAI,
) -> None:
    fields = request(say("abcdef", fail_at=3))
    events, response = run_stream(client, fields["input"])
    assert events[-1].type == "response.failed"
    assert response.status == "failed"
    assert response.error.code == "server_error"
    with pytest.raises(openai.InternalServerError):
        client.responses.create(**fields)
    assert output(client.responses.create(**request(say("still here")))) == [
        "still here"
    ]


def test_a_summary_of_the_thoughts_that_was_asked_for(client: openai.OpenAI) -> None:
    reply = say("<think>hm</think>x")
    response = both(client, reply, reasoning={"effort": "low", "summary": "auto"})
    assert response.output[0].summary[0].text == "hm"


def test_chat_completions_report_errors_like_openai(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    wrong: list[dict[str, Any]] = [
        {"messages": "x"},
        {"messages": [{"content": "x"}]},
        {"messages": []},
        {"max_tokens": "x"},
        {"max_tokens": 0},
        {"stop": 5},
        {"stop": [""]},
        {"temperature": "hot"},
        {"stream_options": 5},
        {"logit_bias": {"99999": 1}},
        {"extra_body": {"top_k": 10**9}, "temperature": 1},
        {"extra_body": {"xtc_threshold": 0.9, "xtc_probability": 1.0}},
        {"seed": 2**70},
        {"temperature": 2**70},
        {"logprobs": True, "top_logprobs": True},
    ]
    for fields in wrong:
        body = {"model": "gpt-x", "messages": messages} | fields
        if "xtc_threshold" in str(fields):
            body["temperature"] = 1
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**body)
        assert caught.value.type == "invalid_request_error"


def test_an_empty_prompt_is_an_error(client: openai.OpenAI) -> None:
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.completions.create(model="gpt-x", prompt="", stream=stream)


def test_chat_completions_work_as_before(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": say(f"<think>hm</think>x{call('f', {})}")}]
    function = {"name": "f", "parameters": {"type": "object"}}
    fields = {"model": "gpt-x", "messages": messages, "max_tokens": 300}
    fields |= {"tools": [{"type": "function", "function": function}]}
    whole = client.chat.completions.create(**fields)
    assert whole.model == "gpt-x"
    assert whole.choices[0].message.content == "x"
    assert whole.choices[0].finish_reason == "tool_calls"
    chunks = [*client.chat.completions.create(**fields, stream=True)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "x"
    options = {"stream": True, "stream_options": {}}
    assert len([*client.chat.completions.create(**fields, **options)]) == len(chunks)
    completion = client.completions.create(model="gpt-x", prompt="hi", max_tokens=3)
    assert completion.choices[0].finish_reason == "stop"


def test_an_exception_within_a_chat_completion(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": say("abcdef", fail_at=3)}]
    fields = {"model": "gpt-x", "messages": messages}
    with pytest.raises(openai.APIError, match="scripted failure"):
        list(client.chat.completions.create(**fields, stream=True))
    with pytest.raises(openai.InternalServerError, match="scripted failure"):
        client.chat.completions.create(**fields)


def test_a_model_that_cannot_be_loaded(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(
            model="nobody/nothing", messages=[{"role": "user", "content": "hi"}]
        )
    assert caught.value.code == "model_not_found"
