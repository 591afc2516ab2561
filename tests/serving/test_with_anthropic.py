"""The official client of Anthropic against a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import pytest

from .conftest import ServerProcess
from .scripted import MAX_POSITIONS, call, say

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
THINKS = {"type": "adaptive"}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> anthropic.Anthropic:
    return server.anthropic()


def request(content: Any, **fields: Any) -> dict[str, Any]:
    messages = content if isinstance(content, list) else [user(content)]
    return {"model": "claude-x", "max_tokens": 500, "messages": messages} | fields


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def without_ids(message: anthropic.types.Message) -> Any:
    value = message.model_dump(exclude={"id", "usage"})
    for block in value["content"]:
        block.pop("id", None)
    return value


def both(client: anthropic.Anthropic, content: Any, **fields: Any) -> Any:
    """The message that comes in one piece, which the streamed one has to equal."""
    whole = client.messages.create(**request(content, **fields))
    with client.messages.stream(**request(content, **fields)) as stream:
        streamed = stream.get_final_message()
    assert without_ids(streamed) == without_ids(whole)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    return whole


def blocks(message: anthropic.types.Message) -> list[Any]:
    shown = {
        "text": lambda block: block.text,
        "thinking": lambda block: ("thinking", block.thinking),
        "tool_use": lambda block: (block.name, block.input),
    }
    return [shown[block.type](block) for block in message.content]


def test_thoughts_texts_and_calls_in_order(client: anthropic.Anthropic) -> None:
    reply = f"<think>hm</think>\n\nfirst{call('f', {'x': 1})}second{call('g', {})}"
    message = both(client, say(reply), thinking=THINKS, tools=[TOOL])
    assert blocks(message) == [
        ("thinking", "hm"),
        "first",
        ("f", {"x": 1}),
        "second",
        ("g", {}),
    ]
    assert message.stop_reason == "tool_use"
    assert message.model == "claude-x"
    ids = [block.id for block in message.content if block.type == "tool_use"]
    assert len(set(ids)) == 2


def test_arguments_survive_the_way(client: anthropic.Anthropic) -> None:
    arguments = {"text": 'ü "q" \\ 😀\n', "deep": {"list": [1, None, {"x": True}]}}
    message = both(client, say(call("f", arguments)), tools=[TOOL])
    assert blocks(message) == [("f", arguments)]


def test_the_arguments_of_a_call_are_streamed_as_they_are_written(
    client: anthropic.Anthropic,
) -> None:
    arguments = {"text": "a" * 40 + 'ü "q"\n', "y": [1, {}]}
    fields = request(say(call("f", arguments)), tools=[TOOL])
    with client.messages.stream(**fields) as stream:
        events = [*stream]
    pieces = [event.partial_json for event in events if event.type == "input_json"]
    assert len(pieces) > 40
    assert events[-1].message.content[0].input == arguments


def test_a_call_that_turns_out_to_be_malformed_is_an_error(
    client: anthropic.Anthropic,
) -> None:
    fields = request(say(call("f", {"x": 1}).replace("}}", ", !}}")), tools=[TOOL])
    with pytest.raises(anthropic.InternalServerError, match="call of f is malformed"):
        client.messages.create(**fields)
    with pytest.raises(anthropic.APIStatusError, match="call of f is malformed"):
        list(client.messages.create(**fields, stream=True))


def test_a_streamed_call_that_is_cut_off_is_no_end_of_the_turn(
    client: anthropic.Anthropic,
) -> None:
    reply = say(call("f", {"text": "a" * 100}))
    fields = request(reply, tools=[TOOL], max_tokens=60)
    with client.messages.stream(**fields) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "max_tokens"
    assert [block.name for block in message.content] == ["f"]


def test_a_malformed_call_is_shown(client: anthropic.Anthropic) -> None:
    reply = f"<tool_call>{{bad</tool_call>{call('f', {})}"
    message = both(client, say(reply), tools=[TOOL])
    assert blocks(message) == ["<tool_call>{bad</tool_call>", ("f", {})]


@pytest.mark.parametrize(
    "pieces",
    [
        ("one STOP two",),
        ("one ", "S", "T", "O", "P", " two"),
        ("one S", "TOP two"),
        ("one STO", "P two"),
        ("one xSTOP".replace("x", ""), " two"),
    ],
)
def test_a_stop_sequence_however_it_is_tokenised(
    client: anthropic.Anthropic, pieces: tuple[str, ...]
) -> None:
    message = both(client, say(*pieces), stop_sequences=["never", "STOP"])
    assert blocks(message) == ["one "]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")


def test_a_stop_sequence_in_a_thought_does_not_count(
    client: anthropic.Anthropic,
) -> None:
    reply = say("<think>a STOP</think>b STOP c")
    message = both(client, reply, stop_sequences=["STOP"], thinking=THINKS)
    assert blocks(message) == [("thinking", "a STOP"), "b "]
    assert message.stop_sequence == "STOP"


def test_max_tokens_within_a_thought_and_within_a_call(
    client: anthropic.Anthropic,
) -> None:
    message = both(client, say("<think>abcdef"), max_tokens=4, thinking=THINKS)
    assert blocks(message) == [("thinking", "abc")]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4
    message = both(client, say(call("f", {"x": 1})), max_tokens=8, tools=[TOOL])
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8


def test_no_tokens_at_all_fill_the_cache_only(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**request(say("abc"), max_tokens=0))
    assert message.content == []
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 0


def test_an_empty_reply(client: anthropic.Anthropic) -> None:
    message = both(client, say(""))
    assert message.content == []
    assert message.stop_reason == "end_turn"


def test_characters_of_several_tokens(client: anthropic.Anthropic) -> None:
    text = "ü€😀👩‍👩‍👧 日本"
    assert blocks(both(client, say(text))) == [text]
    with client.messages.stream(**request(say(text))) as stream:
        pieces = [*stream.text_stream]
    assert len(pieces) > 4
    assert all("�" not in piece for piece in pieces)


def test_events_come_one_by_one(client: anthropic.Anthropic) -> None:
    seen = []
    with client.messages.stream(**request(say("abc"))) as stream:
        seen = [event.type for event in stream if event.type != "text"]
    assert seen == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_usage_adds_up_to_the_count(client: anthropic.Anthropic) -> None:
    content = [user(say("abc") + " never said before")]
    fields = {"model": "claude-x", "messages": content, "tools": [TOOL]}
    count = client.messages.count_tokens(**fields).input_tokens
    first = client.messages.create(max_tokens=9, **fields).usage
    assert first.input_tokens + (first.cache_read_input_tokens or 0) == count
    assert first.output_tokens == 4
    second = client.messages.create(max_tokens=9, **fields).usage
    cached = second.cache_read_input_tokens or 0
    assert cached > count / 2
    assert second.input_tokens + cached == count


def test_the_start_of_a_stream_knows_the_length_of_the_prompt(
    client: anthropic.Anthropic,
) -> None:
    fields = request(say("abc") + " a new one")
    with client.messages.stream(**fields) as stream:
        start = next(iter(stream))
    assert start.type == "message_start"
    assert start.message.usage.input_tokens > 10


def test_a_turn_goes_back_as_it_came(client: anthropic.Anthropic) -> None:
    reply = f"<think>hm</think>ok{call('f', {'x': 1})}"
    first = [user(say(reply))]
    message = client.messages.create(**request(first, thinking=THINKS, tools=[TOOL]))
    turn = {"role": "assistant", "content": message.to_dict()["content"]}
    result = {"type": "tool_result", "tool_use_id": message.content[-1].id}
    redacted = {"type": "redacted_thinking", "data": "xyz"}
    turn["content"] = [redacted, *turn["content"]]
    failed = result | {"content": [{"type": "text", "text": "no"}], "is_error": True}
    last = user([failed, {"type": "text", "text": say("done")}])
    again = both(client, [*first, turn, last], thinking=THINKS, tools=[TOOL])
    assert blocks(again) == ["done"]
    turn["content"][1]["signature"] = ""
    assert blocks(both(client, [*first, turn, last], tools=[TOOL])) == ["done"]


def test_a_second_turn_finds_the_first_in_the_cache(
    client: anthropic.Anthropic,
) -> None:
    first = [user(say("an answer") + "x" * 100)]
    message = client.messages.create(**request(first))
    last = user(say("another"))
    usage = client.messages.create(**request([*first, message.to_param(), last])).usage
    assert (usage.cache_read_input_tokens or 0) > 100


def test_the_billing_header_does_not_spoil_the_cache(
    client: anthropic.Anthropic,
) -> None:
    def cached(value: str) -> int:
        header = {"type": "text", "text": f"x-anthropic-billing-header: cch={value};"}
        system = [header, {"type": "text", "text": "y" * 50}]
        message = client.messages.create(**request(say("abc"), system=system))
        return message.usage.cache_read_input_tokens or 0

    cached("1")
    assert cached("2") > 50


def test_a_begun_reply_is_continued(client: anthropic.Anthropic) -> None:
    messages = [user(say(" and more")), {"role": "assistant", "content": "Begun"}]
    message = both(client, messages)
    assert blocks(message) == [" and more"]


def test_a_forced_call_leaves_the_model_no_choice(client: anthropic.Anthropic) -> None:
    value = say(call("f", {"x": 1}))
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        message = both(client, value, tools=[TOOL], tool_choice=choice)
        assert blocks(message) == [("f", {"x": 1})]


def test_one_call_at_a_time(client: anthropic.Anthropic) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    reply = say(call("f", {}) + call("f", {}))
    message = both(client, reply, tools=[TOOL], tool_choice=choice)
    assert blocks(message) == [("f", {})]
    assert message.stop_reason == "tool_use"


def test_thinking_changes_the_prompt(client: anthropic.Anthropic) -> None:
    def count(**fields: Any) -> int:
        messages = [user("hi")]
        found = client.messages.count_tokens(model="m-1", messages=messages, **fields)
        return found.input_tokens

    # A template that is told not to think closes the thought at once.
    client = client.with_options()
    model_of = {"extra_body": {"model": "claude-y"}}
    on = count(thinking={"type": "enabled", "budget_tokens": 1024}, **model_of)
    off = count(thinking={"type": "disabled"}, **model_of)
    assert off > on
    assert count(**model_of) == off


def test_a_prompt_that_is_too_long(client: anthropic.Anthropic) -> None:
    content = "x " * MAX_POSITIONS
    count = client.messages.count_tokens(model="claude-x", messages=[user(content)])
    for create in (client.messages.create, client.messages.stream):
        with pytest.raises(anthropic.BadRequestError) as caught:
            with_stream(create(**request(content)))
        expected = f"prompt is too long: {count.input_tokens} tokens > {MAX_POSITIONS}"
        assert expected in str(caught.value)
        assert caught.value.type == "invalid_request_error"


def with_stream(reply: Any) -> None:
    with reply as stream:
        stream.get_final_message()


def test_the_end_of_the_context(client: anthropic.Anthropic) -> None:
    reply = say("a" * 200)
    room = 20
    fields = {"model": "claude-x", "messages": [user(reply)]}
    count = client.messages.count_tokens(**fields).input_tokens
    padding = "." * (MAX_POSITIONS - count - room)
    message = client.messages.create(**request(padding + reply))
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == room


def test_images_are_refused_by_a_model_without_eyes(
    client: anthropic.Anthropic,
) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    with pytest.raises(anthropic.BadRequestError, match="takes no images"):
        client.messages.create(**request([user([{"type": "image", "source": source}])]))


def test_concurrent_streams_do_not_mix(client: anthropic.Anthropic) -> None:
    def run(text: str) -> tuple[str, str]:
        fields = request(say(text, sleep=0.005))
        with client.messages.stream(**fields) as stream:
            message = stream.get_final_message()
        return message.id, blocks(message)[0]

    texts = [letter * 20 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(run, texts)]
    assert [text for _, text in found] == texts
    assert len({name for name, _ in found}) == 4


def test_an_exception_within_a_stream_is_an_error_event(
    server: ServerProcess, client: anthropic.Anthropic
) -> None:
    fields = request(say("abcdef", fail_at=3))
    with pytest.raises(anthropic.APIStatusError) as caught:
        with_stream(client.messages.stream(**fields))
    assert caught.value.type == "api_error"
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**fields)
    assert caught.value.type == "api_error"
    assert blocks(both(client, say("still here"))) == ["still here"]


def test_wrong_requests_raise_the_right_class(client: anthropic.Anthropic) -> None:
    wrong: list[dict[str, Any]] = [
        {"messages": []},
        {"messages": "x"},
        {"max_tokens": "x"},
        {"extra_body": {"temperature": -1}},
        {"extra_body": {"top_k": 10**9, "temperature": 1.0}},
        {"extra_body": {"logit_bias": {"99999": 1}}},
        {"extra_body": {"stream": "yes"}},
    ]
    for fields in wrong:
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**request("hi") | fields)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id is not None


def test_a_model_that_cannot_be_loaded(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**request("hi", model="nobody/nothing"))
    assert caught.value.type == "not_found_error"
    assert blocks(client.messages.create(**request(say("back")))) == ["back"]


def test_the_served_model_goes_by_many_names(
    server: ServerProcess, client: anthropic.Anthropic
) -> None:
    for model in ("claude-opus-4", "gpt-5", "default_model", str(server.folder)):
        message = client.messages.create(**request(say("x"), model=model))
        assert message.model == model


def test_sampling_parameters_are_honoured(client: anthropic.Anthropic) -> None:
    token = {"!": 0}
    body = {"logit_bias": {str(token["!"]): 100.0}}
    fields = request(say("abc"), max_tokens=3, extra_body=body)
    assert blocks(client.messages.create(**fields)) == ["!!!"]


def test_a_request_that_is_served_alone_is_no_different(
    client: anthropic.Anthropic,
) -> None:
    text = say("one STOP") + "for nobody else" * 5
    fields = {"extra_body": {"seed": 1}, "stop_sequences": ["STOP"]}
    message = both(client, text, **fields)
    assert blocks(message) == ["one "]
    with client.messages.stream(**request(text, **fields)) as stream:
        start = next(iter(stream))
    assert start.type == "message_start"
    assert (start.message.usage.cache_read_input_tokens or 0) > 70
