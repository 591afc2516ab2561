"""Requests that are legal and that nobody expects, on every route that generates."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest

from mlx_optiq_ext.serving._exchange import parse_object

from .conftest import ServerProcess
from .scripted import call, say
from .wire import Reply, post

Body = dict[str, Any]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}


def chat(text: str) -> Body:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 200}


def completion(text: str) -> Body:
    return {"prompt": text, "max_tokens": 200}


def message(text: str) -> Body:
    return {"model": "claude-x", **chat(text)}


def response(text: str) -> Body:
    return {"input": text, "max_output_tokens": 200}


ROUTES: dict[str, Callable[[str], Body]] = {
    CHAT: chat,
    TEXT: completion,
    MESSAGES: message,
    RESPONSES: response,
}
TOOLS: dict[str, Body] = {
    CHAT: {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    MESSAGES: {"name": "f", "input_schema": SCHEMA},
    RESPONSES: {"type": "function", "name": "f", "parameters": SCHEMA},
}
every_route = pytest.mark.parametrize("path", ROUTES)
every_route_with_tools = pytest.mark.parametrize("path", TOOLS)


def ask(server: ServerProcess, path: str, text: str, **fields: Any) -> Reply:
    return post(server, path, ROUTES[path](text) | fields)


def text_of(reply: Reply) -> str:
    """The text of a whole reply, of whichever route."""
    body = reply.body
    if "choices" in body:
        choice = body["choices"][0]
        return choice.get("message", choice).get("content", choice.get("text")) or ""
    if "content" in body:
        return "".join(b["text"] for b in body["content"] if b["type"] == "text")
    items = [item for item in body["output"] if item["type"] == "message"]
    return "".join(item["content"][0]["text"] for item in items)


def calls_of(reply: Reply) -> list[Any]:
    """The names and arguments of calls in a whole reply."""
    body = reply.body
    if "choices" in body:
        calls = body["choices"][0]["message"].get("tool_calls", [])
        functions = [each["function"] for each in calls]
    elif "content" in body:
        blocks = [block for block in body["content"] if block["type"] == "tool_use"]
        return [(block["name"], block["input"]) for block in blocks]
    else:
        functions = [i for i in body["output"] if i["type"] == "function_call"]
    return [(each["name"], json.loads(each["arguments"])) for each in functions]


def error_of(reply: Reply) -> str:
    assert reply.status == 400
    return reply.body["error"]["message"]


FINE: list[Body] = [
    {"temperature": 0},
    {"temperature": 2, "top_p": 1},
    {"temperature": 1e-30},
    {"temperature": 1, "top_p": 0},
    {"temperature": 1, "min_p": 1},
    {"temperature": 1, "top_k": 1},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"stop": None},
    {"stop": []},
    {"stop_sequences": ["zzz"] * 20},
    {"logit_bias": {}},
    {"logit_bias": {"65": 0.5}},
    {"repetition_penalty": 0},
    {"repetition_penalty": 1.0, "repetition_context_size": 0},
    {"presence_penalty": -2, "frequency_penalty": 0.0},
    {"xtc_probability": 0},
    {"temperature": 1, "xtc_probability": 1, "xtc_threshold": 0.5},
    {"num_draft_tokens": 0},
    {"metadata": {"a": {"b": [1]}}, "user": "x", "service_tier": "auto"},
    {"nobody_knows_this": {"deep": [None]}},
    {"max_tokens": None, "max_completion_tokens": None, "max_output_tokens": 10**9}
    | {"max_tokens": 10**9},
]


@every_route
@pytest.mark.parametrize("fields", FINE, ids=lambda fields: "-".join(fields))
def test_what_is_legal_is_answered(
    path: str, fields: Body, server: ServerProcess
) -> None:
    reply = ask(server, path, say("ok"), **fields)
    assert reply.status == 200, reply.body
    assert text_of(reply) == "ok"


WRONG: list[tuple[Body, str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 1.0}, "seed"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stop_sequences": ["x", ""]}, "stop_sequences.1"),
    ({"stop_sequences": [5]}, "stop_sequences.0"),
    ({"n": 2.0}, "n"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"model": 5}, "model"),
    ({"adapters": 5}, "adapters"),
]


@every_route
@pytest.mark.parametrize(("fields", "name"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_named(
    path: str, fields: Body, name: str, server: ServerProcess
) -> None:
    assert name in error_of(ask(server, path, say("ok"), **fields))


@every_route
@pytest.mark.parametrize("half", ["\ud83d", "a\udfffb", "\ud83d\ud83d"])
def test_half_a_character_is_put_up_with(
    path: str, half: str, server: ServerProcess
) -> None:
    assert text_of(ask(server, path, f"{half}{say('ok')}")) == "ok"


def test_half_a_character_becomes_the_one_that_stands_for_it() -> None:
    for text, expected in (
        (r"\ud83d", "\ufffd"),
        (r"\uDE00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\\ud83d", r"\ud83d"),
    ):
        data = f'{{"{text}": ["{text}", 1, 0.5, {10**30}]}}'.encode()
        assert parse_object(data) == {expected: [expected, 1, 0.5, 10**30]}


@every_route
def test_a_text_in_any_script(path: str, server: ServerProcess) -> None:
    said = "é 日本 \U0001f600 \u200d\u2028\\ \"'</s>"
    assert text_of(ask(server, path, f"\x00{say(said)}\u2029")) == said


@every_route
@pytest.mark.parametrize("stop", ["\U0001f600", "日本", "é", "\n", " "])
def test_a_stop_sequence_of_several_tokens(
    path: str, stop: str, server: ServerProcess
) -> None:
    reply = ask(server, path, say(f"so{stop}not"), stop_sequences=[stop])
    assert text_of(reply) == "so"


@every_route
def test_a_prompt_at_the_end_of_the_context(path: str, server: ServerProcess) -> None:
    message = error_of(ask(server, path, "x" * 4097))
    assert "maximum" in message


def test_tokens_that_there_are_none_of(server: ServerProcess) -> None:
    for token in (-1, 10**9, 2**64):
        reply = post(server, TEXT, {"prompt": [1, token, 2]})
        assert f"no token {token}" in error_of(reply)
    assert post(server, TEXT, {"prompt": [[1, 2]], "max_tokens": 1}).status == 200
    assert post(server, TEXT, {"prompt": [1] * 4096, "max_tokens": 5}).status == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_seeds_of_several_replies_start_again_at_zero(
    path: str, server: ServerProcess
) -> None:
    reply = ask(server, path, say("ok"), n=8, seed=2**64 - 2)
    assert reply.status == 200
    assert len(reply.body["choices"]) == 8


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_eight_replies_with_a_stop_sequence_and_log_probabilities(
    path: str, server: ServerProcess, *, stream: bool
) -> None:
    fields: Body = {"n": 8, "stop": "STOP", "stream": stream}
    fields |= {"logprobs": True, "top_logprobs": 20}
    reply = ask(server, path, say("abSTOPc"), **fields)
    events = reply.events if stream else [reply.body]
    choices = [choice for event in events for choice in event["choices"]]
    tokens = ["" for _ in range(8)]
    for choice in choices:
        for entry in choice["logprobs"]["content"]:
            tokens[choice["index"]] += entry["token"]
            assert len(entry["top_logprobs"]) == 20
    assert tokens == ["abSTOP"] * 8


# Calls.


@every_route_with_tools
@pytest.mark.parametrize(
    "arguments",
    [
        {"x": 'é \U0001f600 "\\\n\t\u2028'},
        {"x": "</tool_call>"},
        {"x": "<think>"},
        {"x": {"y": [1, 2.5, None, True, "z"]}},
        {"x": 10**30},
        {"": ""},
    ],
)
def test_arguments_of_any_kind(
    path: str, arguments: Body, server: ServerProcess
) -> None:
    text = say(call("f", arguments))
    reply = ask(server, path, text, tools=[TOOLS[path]])
    assert calls_of(reply) == [("f", arguments)]


@every_route_with_tools
@pytest.mark.parametrize("number", ["1e999", "-1e400", "NaN", "Infinity"])
def test_no_reply_has_numbers_that_json_has_not(
    path: str, number: str, server: ServerProcess
) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {number}}}}}</tool_call>'
    reply = ask(server, path, say(text), tools=[TOOLS[path]])
    assert reply.status == 500
    assert "call of f is malformed" in reply.body["error"]["message"]
    assert "Traceback" not in server.output()[-1000:]


@every_route_with_tools
def test_two_calls_around_a_text(path: str, server: ServerProcess) -> None:
    text = f"a{call('f', {'x': '1'})}b{call('f', {})}"
    reply = ask(server, path, say(text), tools=[TOOLS[path]])
    assert calls_of(reply) == [("f", {"x": "1"}), ("f", {})]
    assert text_of(reply) == "ab"


@every_route_with_tools
def test_a_call_that_is_cut_off_anywhere_is_no_end(
    path: str, server: ServerProcess
) -> None:
    ends = {"tool_calls", "tool_use", "completed", "stop", "end_turn"}
    for max_tokens in range(3, 30, 3):
        text = say(call("f", {"x": "abc"}))
        fields: Body = {"max_tokens": max_tokens, "max_output_tokens": max_tokens}
        body = ask(server, path, text, tools=[TOOLS[path]], **fields).body
        reason = body.get("stop_reason", body.get("status"))
        if "choices" in body:
            reason = body["choices"][0]["finish_reason"]
        assert reason not in ends


# Connections.


@every_route
def test_a_client_that_leaves_before_the_first_token(
    path: str, server: ServerProcess
) -> None:
    body = json.dumps(ROUTES[path](say("late", prefill_sleep=0.5)) | {"stream": True})
    num_before = server.output().count("Traceback")
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", path, body)
        connection.close()
    assert text_of(ask(server, path, say("next"))) == "next"
    assert server.output().count("Traceback") == num_before


@every_route
def test_of_two_requests_in_one_go_the_first_is_answered(
    path: str, server: ServerProcess
) -> None:
    data = json.dumps(ROUTES[path](say("ok"))).encode()
    head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with server.connect() as connection:
        connection.sendall((head + data) * 2)
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.count(b" 200 OK\r\n") == 1
    assert reply.endswith(b"}")


@every_route
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_versions_of_http(path: str, version: str, server: ServerProcess) -> None:
    data = json.dumps(ROUTES[path](say("ok"))).encode()
    lines = f"POST {path} HTTP/{version}", f"X: {'x' * 60_000}", "Expect: 100-continue"
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode()
    with server.connect() as connection:
        connection.sendall(head + data)
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b" 200 OK\r\n" in reply


@every_route
def test_a_body_of_unknown_length_is_asked_for_again(
    path: str, server: ServerProcess
) -> None:
    data = json.dumps(ROUTES[path](say("ok"))).encode()
    head = f"POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with server.connect() as connection:
        connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b" 411 " in reply.partition(b"\r\n")[0]
    assert b"Content-Length header is required" in reply
