"""Conversations that take turns with others find what they have processed before."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from tests.helpers import DEMO

from .conftest import TIMEOUT, ServerProcess, Starter
from .wire import post

Message = dict[str, str]


@pytest.fixture(scope="module", params=["plain", "mtp"])
def server(request: pytest.FixtureRequest, start_server: Starter) -> ServerProcess:
    flags = ("--mtp",) if request.param == "mtp" else ()
    return start_server(*flags, folder=DEMO)


def ask(server: ServerProcess, messages: list[Message]) -> tuple[str, int, float]:
    """The reply, the length of the prompt, and the part of it that was cached."""
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        reply: dict[str, Any] = json.load(response)
    usage = reply["usage"]
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    text = reply["choices"][0]["message"]["content"] or ""
    return text, usage["prompt_tokens"], num_cached / usage["prompt_tokens"]


def conversation(topic: str, num_sentences: int = 60) -> list[Message]:
    system = {"role": "system", "content": f"You know {topic}. " * num_sentences}
    return [system, {"role": "user", "content": f"Tell me about {topic}."}]


def take_turn(server: ServerProcess, messages: list[Message]) -> float:
    """How much of the prompt was cached; the conversation goes on."""
    text, _, share = ask(server, messages)
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And?"},
    ]
    return share


def test_long_conversations_and_side_requests_leave_each_other_warm(
    server: ServerProcess,
) -> None:
    first, second = conversation("the sea"), conversation("functions")
    for _ in range(3):
        take_turn(server, first)
        take_turn(server, second)
    for number in range(10):
        ask(server, conversation(f"titles of kind {number}", 3))
    assert take_turn(server, first) >= 0.95
    assert take_turn(server, second) >= 0.95


def test_many_turns_of_another_conversation_leave_the_first_one_warm(
    server: ServerProcess,
) -> None:
    first, second = conversation("kings"), conversation("loops")
    take_turn(server, first)
    for num_turns in range(5):
        for _ in range(num_turns):
            take_turn(server, second)
        assert take_turn(server, first) >= 0.9


def test_a_loop_of_tools_is_warm_however_calls_are_sent_back(
    server: ServerProcess,
) -> None:
    messages = conversation("files")
    num_before = 0
    for number in range(4):
        text, num_tokens, share = ask(server, messages)
        assert share * num_tokens >= num_before - 1
        # Clients write the reply back a little differently.
        messages += [
            {"role": "assistant", "content": f"Call {number}: {text}"},
            {"role": "tool", "content": f"result {number}"},
        ]
        # The turn before is kept up to where the reply to it began.
        num_before = num_tokens if number else 0


def test_a_message_of_a_developer_in_the_middle_costs_itself_only(
    server: ServerProcess,
) -> None:
    *_, system = conversation("gardens")[0].values()
    items: list[Message] = [{"role": "user", "content": "Tell me."}]
    num_before = 0
    for number in range(5):
        body = {"instructions": system, "input": items, "max_output_tokens": 12}
        reply = post(server, "/v1/responses", body | {"temperature": 0}).body
        usage = reply["usage"]
        num_cached = usage["input_tokens_details"]["cached_tokens"]
        assert num_cached >= 0.95 * num_before
        num_before = usage["input_tokens"]
        items += [*reply["output"]]
        if number == 3:
            items += [{"role": "developer", "content": "Be brief from now on."}]
        items += [{"role": "user", "content": "And?"}]


def test_the_same_prompt_again_is_answered_alike(server: ServerProcess) -> None:
    messages = conversation("ships")
    replies = [ask(server, messages) for _ in range(3)]
    assert len({text for text, *_ in replies}) == 1
    assert all(share >= 0.95 for *_, share in replies[1:])


def test_a_message_that_was_changed_costs_what_comes_after_it(
    server: ServerProcess,
) -> None:
    messages = conversation("bread")
    for _ in range(3):
        take_turn(server, messages)
    assert ask(server, messages)[2] >= 0.95
    messages[-1]["content"] = "Or so?"
    assert ask(server, messages)[2] >= 0.95


def test_the_number_of_prompts_can_be_limited(start_server: Starter) -> None:
    server = start_server("--prompt-cache-size", "2", folder=DEMO)
    first, second = conversation("the sea"), conversation("functions")
    take_turn(server, first)
    take_turn(server, second)
    assert take_turn(server, first) < 0.95
