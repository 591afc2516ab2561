"""Exchanges with coding agents: several turns with tools, read as each agent reads.

The requests are files. In them %SAY% stands for what the model is to say, %TURN% for
the number of the turn, and %CALL_0% for the id of the first call of the turn before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import ServerProcess, Starter
from .scripted import make_model, say
from .scripted_drafter import START_WITH_DRAFTER, make_drafter
from .wire import Reply, post, request

Body = dict[str, Any]

EXCHANGES = Path(__file__).parents[1] / "data" / "agents"


class Said(NamedTuple):
    """A reply as an agent understands it.

    Args:
        text: The answer.
        thought: What came before it.
        calls: The name and the arguments of each.
        call_ids: The id of each.
        num_prompt_tokens: Of the prompt.
        num_cached_tokens: Those of them that were in the cache.
        history: What the agent sends back of the reply.
    """

    text: str
    thought: str
    calls: list[list[Any]]
    call_ids: list[str]
    num_prompt_tokens: int
    num_cached_tokens: int
    history: list[Body]


def read_message(reply: Reply) -> Said:
    """As Claude Code does, which loses what is in no block of its kind."""
    frames = reply.frames
    assert all(frame.name == frame.data["type"] for frame in frames)
    events = [frame.data for frame in frames if frame.name != "ping"]
    start, *middle, delta, stop = events
    assert start["type"] == "message_start"
    assert start["message"]["content"] == []
    assert (delta["type"], stop["type"]) == ("message_delta", "message_stop")
    blocks: list[Body] = []
    is_open = False
    for event in middle:
        kind = event["type"].removeprefix("content_block_")
        assert is_open == (kind != "start")
        if kind == "start":
            blocks.append(dict(event["content_block"]))
        elif kind == "delta":
            _extend(blocks[-1], event["delta"])
        is_open = kind != "stop"
        assert event["index"] == len(blocks) - 1
    calls = [block for block in blocks if block["type"] == "tool_use"]
    for block in calls:
        block["input"] = json.loads(block.pop("json"))
    thoughts = [block for block in blocks if block["type"] == "thinking"]
    assert all(block["signature"] for block in thoughts)
    assert delta["delta"]["stop_reason"] == ("tool_use" if calls else "end_turn")
    usage = start["message"]["usage"] | delta["usage"]
    num_cached = usage["cache_read_input_tokens"]
    return Said(
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        "".join(block["thinking"] for block in thoughts),
        [[block["name"], block["input"]] for block in calls],
        [block["id"] for block in calls],
        usage["input_tokens"] + num_cached,
        num_cached,
        [{"role": "assistant", "content": blocks}],
    )


def _extend(block: Body, delta: Body) -> None:
    kind, name = {
        "text_delta": ("text", "text"),
        "thinking_delta": ("thinking", "thinking"),
        "signature_delta": ("thinking", "signature"),
        "input_json_delta": ("tool_use", "partial_json"),
    }[delta["type"]]
    assert block["type"] == kind
    field = "json" if kind == "tool_use" else name
    # A signature ends a thought.
    assert field == "signature" or not block.get("signature")
    block[field] = block.get(field, "") + delta[name]


def read_response(reply: Reply) -> Said:
    """As Codex does, which runs what a complete item says."""
    frames = reply.frames
    events = [frame.data for frame in frames]
    assert all(frame.name == frame.data["type"] for frame in frames)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    last = events[-1]
    assert last["type"] == "response.completed"
    items: list[Body] = []
    texts: dict[str, str] = {}
    for event in events[1:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) == len(texts)
            texts[event["item"]["id"]] = ""
        elif kind == "output_item.done":
            items.append(event["item"])
            assert event["item"]["id"] == [*texts][-1]
            assert event["item"]["status"] == "completed"
        elif kind.endswith(".delta") and "summary" not in kind:
            # There is no delta without an active item.
            texts[event["item_id"]] += event["delta"]
            assert len(items) == len(texts) - 1
    assert last["response"]["output"] == items
    for item in items:
        assert texts[item["id"]] == _content_of(item)
    usage = last["response"]["usage"]
    calls = [item for item in items if item["type"].endswith("_call")]
    return Said(
        "".join(_content_of(each) for each in items if each["type"] == "message"),
        "".join(_content_of(each) for each in items if each["type"] == "reasoning"),
        [[_name_of(item), _input_of(item)] for item in calls],
        [item["call_id"] for item in calls],
        usage["input_tokens"],
        usage["input_tokens_details"]["cached_tokens"],
        [_sent_back(item) for item in items],
    )


def _content_of(item: Body) -> str:
    if item["type"] in ("message", "reasoning"):
        (part,) = item["content"]
        return part["text"]
    return item["arguments" if item["type"] == "function_call" else "input"]


def _name_of(item: Body) -> str:
    return "/".join(filter(None, [item.get("namespace"), item["name"]]))


def _input_of(item: Body) -> Any:
    content = _content_of(item)
    return json.loads(content) if item["type"] == "function_call" else content


def _sent_back(item: Body) -> Body:
    """Without the ids of what is stored nowhere, and without the raw thought."""
    dropped = {"id", "status", "content" if item["type"] == "reasoning" else ""}
    return {name: value for name, value in item.items() if name not in dropped}


def read_chat(reply: Reply) -> Said:
    """As the clients of chat completions do that put calls together themselves."""
    assert reply.frames[-1].data == "[DONE]"
    *chunks, last = reply.events
    assert last["choices"] == []
    assert {chunk["object"] for chunk in reply.events} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in reply.events}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (
        len(deltas) - 1
    )
    calls: list[Body] = []
    for delta in deltas:
        for piece in delta.get("tool_calls", []):
            _add_piece(calls, piece)
    *reasons, reason = [choice["finish_reason"] for choice in choices]
    assert reason == ("tool_calls" if calls else "stop")
    assert not any(reasons)
    message: Body = {
        "role": "assistant",
        "content": "".join(delta.get("content", "") for delta in deltas),
        "reasoning_content": "".join(d.get("reasoning_content", "") for d in deltas),
    }
    if calls:
        message["tool_calls"] = calls
    return Said(
        message["content"],
        message["reasoning_content"],
        [
            [c["function"]["name"], json.loads(c["function"]["arguments"])]
            for c in calls
        ],
        [call["id"] for call in calls],
        last["usage"]["prompt_tokens"],
        last["usage"]["prompt_tokens_details"]["cached_tokens"],
        [message],
    )


def _function_of(call: Body) -> list[Any]:
    return [call["function"]["name"], json.loads(call["function"]["arguments"])]


def _add_piece(calls: list[Body], piece: Body) -> None:
    if piece["index"] == len(calls):
        assert piece["id"].startswith("call_")
        assert piece["type"] == "function"
        assert piece["function"]["name"]
        calls.append({"id": piece["id"], "type": "function", "function": {}})
        calls[-1]["function"] = dict(piece["function"])
    else:
        assert piece["index"] == len(calls) - 1
        calls[-1]["function"]["arguments"] += piece["function"]["arguments"]


def read_chat_without_thought(reply: Reply) -> Said:
    """As clients do that keep thoughts to themselves and know null for no text."""
    said = read_chat(reply)
    (message,) = said.history
    kept = {name: message[name] for name in message if name != "reasoning_content"}
    if not kept["content"].strip():
        kept["content"] = None
    return said._replace(history=[kept])


READERS: dict[str, Callable[[Reply], Said]] = {
    "claude_code": read_message,
    "codex": read_response,
    "opencode": read_chat,
    "zed": read_chat_without_thought,
    "open_webui": read_chat_without_thought,
}
HISTORY = {"/v1/responses": "input"}


@pytest.fixture(scope="module", params=["plain", "drafted"])
def server(
    request: pytest.FixtureRequest,
    start_server: Starter,
    tmp_path_factory: pytest.TempPathFactory,
) -> ServerProcess:
    folder = make_model(tmp_path_factory.mktemp("long"), max_positions=1 << 16)
    if request.param == "plain":
        return start_server(folder=folder)
    drafter = make_drafter(tmp_path_factory.mktemp("drafter"))
    return start_server(
        "--draft", str(drafter), folder=folder, start=START_WITH_DRAFTER
    )


def load(name: str) -> Body:
    return json.loads((EXCHANGES / f"{name}.json").read_text())


def filled(value: Any, number: int, says: str, call_ids: list[str]) -> Any:
    """A part of a request with the places in it filled."""
    text = json.dumps(value).replace("%TURN%", str(number))
    text = text.replace("%SAY%", json.dumps(say(says))[1:-1])
    for index, call_id in enumerate(call_ids):
        text = text.replace(f"%CALL_{index}%", call_id)
    return json.loads(text)


def test_every_exchange_has_a_reader() -> None:
    assert {file.stem for file in EXCHANGES.iterdir()} == {*READERS}


@pytest.mark.parametrize("name", READERS)
def test_an_agent_gets_what_it_needs(name: str, server: ServerProcess) -> None:
    exchange = load(name)
    path, headers = exchange["path"], exchange["headers"]
    history: list[Body] = []
    call_ids: list[str] = []
    num_before = 0
    for number, turn in enumerate(exchange["turns"]):
        history += filled(turn["adds"], number, turn["says"], call_ids)
        body = filled(exchange["body"], number, "", [])
        body[HISTORY.get(path, "messages")] = history
        said = READERS[name](post(server, path, body, headers))
        assert said.text == turn["text"]
        assert said.thought == turn["thought"]
        assert said.calls == turn["calls"]
        assert len({*said.call_ids}) == len(said.calls)
        # What was processed in the turn before is not processed again.
        assert said.num_cached_tokens >= 0.95 * num_before
        num_before, call_ids = said.num_prompt_tokens, said.call_ids
        history += said.history


def test_claude_code_asks_for_more_than_replies(server: ServerProcess) -> None:
    exchange = load("claude_code")
    assert request(server, "HEAD", "/", headers=exchange["headers"]).status == 200
    turn = exchange["turns"][0]
    body = filled(exchange["body"], 0, "", [])
    body["messages"] = filled(turn["adds"], 0, turn["says"], [])
    said = read_message(post(server, exchange["path"], body, exchange["headers"]))
    for name in ("max_tokens", "stream", "temperature", "metadata"):
        del body[name]
    path = "/v1/messages/count_tokens?beta=true"
    counted = post(server, path, body, exchange["headers"]).body
    assert counted == {"input_tokens": said.num_prompt_tokens}
    quota = {"role": "user", "content": "quota"}
    probe = {"model": "claude-haiku-4-5", "max_tokens": 1, "messages": [quota]}
    assert post(server, exchange["path"], probe).status == 200


def test_open_webui_asks_for_titles(server: ServerProcess) -> None:
    body = {
        "model": "default_model",
        "messages": [{"role": "user", "content": f"A title: {say('{}')}"}],
        "stream": False,
        "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation"},
    }
    reply = post(server, "/v1/chat/completions", body).body
    assert reply["choices"][0]["message"]["content"] == "{}"
    assert reply["usage"]["completion_tokens"] == 3


def test_continue_completes_lines(server: ServerProcess) -> None:
    body = {
        "model": "default_model",
        "prompt": f"<fim_prefix>def f(<fim_suffix>{say('x):', chr(10), 'class A')}",
        "max_tokens": 256,
        "temperature": 0.01,
        "stream": True,
        "stop": ["<fim_middle>", "\n\n", "\nclass", "/src/"],
    }
    reply = post(server, "/v1/completions", body)
    choices = [event["choices"][0] for event in reply.events]
    assert "".join(choice["text"] for choice in choices) == "x):"
    assert choices[-1]["finish_reason"] == "stop"
