"""Requests that users of servers like this one have reported, and what they need."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.helpers import DEMO

from .conftest import ServerProcess, Starter
from .scripted import make_model
from .wire import Reply, post

Body = dict[str, Any]
Servers = dict[str, ServerProcess]

REPORTED = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(__file__).parents[1] / "data" / "reported").glob("*.json"))
}
WHOLE = [name for name, case in REPORTED.items() if "reply" in case]
CHATS = [
    name for name in WHOLE if "choices.0.message.content" in REPORTED[name]["reply"]
]
FORMATS = [name for name in REPORTED if name.endswith("_response_format")]
GEMMA_MARKERS = "<|tool_call> <tool_call|>"


@pytest.fixture(scope="module")
def servers(start_server: Starter, strict_folder: Path, tmp_path_factory: Any) -> Any:
    gemma = make_model(tmp_path_factory.mktemp("gemma"), markers=GEMMA_MARKERS)
    folders = {"strict": strict_folder, "gemma": gemma, "demo": DEMO}
    return {name: start_server(folder=folder) for name, folder in folders.items()}


def ask(servers: Servers, name: str, **fields: Any) -> Reply:
    case = REPORTED[name]
    return post(servers[case["server"]], case["path"], case["body"] | fields)


def field_of(reply: Any, path: str) -> Any:
    for name in path.split("."):
        reply = reply[int(name)] if isinstance(reply, list) else reply[name]
    return reply


@pytest.mark.parametrize("name", WHOLE)
def test_what_was_reported_is_answered(name: str, servers: Servers) -> None:
    expected = {"status": 200} | REPORTED[name]["reply"]
    reply = ask(servers, name)
    found = {"status": reply.status, **reply.body}
    assert {path: field_of(found, path) for path in expected} == expected


@pytest.mark.parametrize("name", CHATS)
def test_what_was_reported_is_answered_alike_in_a_stream(
    name: str, servers: Servers
) -> None:
    expected = REPORTED[name]["reply"]
    choices = [each["choices"][0] for each in ask(servers, name, stream=True).events]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == expected["choices.0.message.content"]
    reason = expected.get("choices.0.finish_reason", "stop")
    assert choices[-1]["finish_reason"] == reason


def test_log_probabilities_are_in_streams(servers: Servers) -> None:
    *chunks, last = ask(servers, "chat_logprobs_stream").events
    entries = [e for c in chunks for e in c["choices"][0]["logprobs"]["content"]]
    entries += last["choices"][0]["logprobs"]["content"]
    assert len(entries) == 5
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_the_stream_helper_of_openai_finds_the_usage(servers: Servers) -> None:
    body = copy.deepcopy(REPORTED["chat_stream_usage_object"]["body"])
    del body["stream"]
    client = servers["demo"].openai()
    with client.chat.completions.stream(model="gpt-x", **body) as stream:
        stream.until_done()
        usage = stream.current_completion_snapshot.usage
    assert usage is not None
    assert usage.completion_tokens == 5
    last = ask(servers, "chat_stream_usage_object").events[-1]
    assert last["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_never_ignored(name: str, servers: Servers) -> None:
    reply = ask(servers, name)
    assert reply.status == 400
    assert reply.body["error"]["code"] == "unsupported_parameter"
    assert reply.body["error"]["param"] == "response_format"


def test_gemmas_keys_may_have_hyphens(servers: Servers) -> None:
    body = copy.deepcopy(REPORTED["gemma4_hyphen_key_stream"]["body"])
    del body["stream"]
    client: anthropic.Anthropic = servers["gemma"].anthropic()
    with client.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for message in (streamed, client.messages.create(**body)):
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.type == "tool_use"
        assert call.name == "Grep"
        assert call.input == {"pattern": "foo", "-n": True}
    function = {"name": "Grep", "parameters": body["tools"][0]["input_schema"]}
    tool: Any = {"type": "function", "function": function}
    chat: openai.OpenAI = servers["gemma"].openai()
    fields = {"model": "gpt-x", "messages": body["messages"], "tools": [tool]}
    choice = chat.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (asked,) = choice.message.tool_calls or ()
    assert json.loads(asked.function.arguments) == {"pattern": "foo", "-n": True}


def test_what_follows_the_billing_line_in_its_block_is_kept(servers: Servers) -> None:
    name = "system_block_with_billing_header"
    (block,) = REPORTED[name]["body"]["system"]
    rest = block | {"text": block["text"].partition("\n")[2]}
    found, expected, without = (
        ask(servers, name, system=system).body for system in ([block], [rest], [])
    )
    assert found == expected
    assert found["input_tokens"] > without["input_tokens"] + 10


@pytest.mark.parametrize("is_list", [False, True])
def test_a_billing_line_that_changes_spoils_no_cache(
    servers: Servers, *, is_list: bool
) -> None:
    name = "system_string_with_billing_header"
    system = REPORTED[name]["body"]["system"]
    for number in range(2):
        text = system.replace("cch=00001", f"cch=0000{number}")
        asked = [{"type": "text", "text": text}] if is_list else text
        usage = ask(servers, name, system=asked).body["usage"]
    assert usage["cache_read_input_tokens"] > 0.95 * (
        usage["cache_read_input_tokens"] + usage["input_tokens"]
    )
