"""Spans of accepted tokens that cross what ends or divides a reply.

Nearly every draft is accepted here, so a round emits up to nine tokens, across markers
of thoughts and calls, stop sequences, limits and the end of the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Starter
from .scripted import call, say
from .scripted_drafter import START_WITH_DRAFTER, make_drafter
from .test_speculation import (
    ANTHROPIC,
    CHAT,
    COMPLETIONS,
    RESPONSES,
    Pair,
    Reply,
    assert_counts_add_up,
)

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOLS: dict[str, list[Any]] = {
    ANTHROPIC: [{"name": "f", "input_schema": {"type": "object"}}],
    RESPONSES: [{"type": "function", **FUNCTION}],
    CHAT: [{"type": "function", "function": FUNCTION}],
}
LIMITS = {RESPONSES: "max_output_tokens"}
ARGUMENTS = {"text": 'ü "q" 😀', "deep": {"x": [1]}}
REPLIES = {
    "text": "ab STOP cd",
    "thought": "<think>why STOP not</think>\n\nso ab",
    "characters": "ü€😀👩‍👩‍👧 日本",
    "nothing": "",
    "calls": f"one {call('f', ARGUMENTS)}two {call('f', {})}",
    "malformed": f"<tool_call>{{bad</tool_call>and {call('f', {})}",
    "all": f"<think>hm</think>x{call('f', ARGUMENTS)}{call('f', {})}y",
}


@pytest.fixture(scope="module")
def pair(start_server: Starter, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return start_pair(start_server, tmp_path_factory.mktemp("drafter"))


def start_pair(start_server: Starter, place: Path, **options: Any) -> Pair:
    """Servers of a scripted model, one with the drafter that knows the script."""
    drafter = str(make_drafter(place))
    speculating = start_server("--draft", drafter, start=START_WITH_DRAFTER, **options)
    return Pair(speculating, start_server(**options))


def compare(pair: Pair, path: str, text: str, **options: Any) -> Reply:
    """What both servers reply when the model says a text, whole and streamed."""
    content = say(text)
    given = {"input": content} if path == RESPONSES else {"prompt": content}
    if path in (CHAT, ANTHROPIC):
        given = {"messages": [{"role": "user", "content": content}]}
    if path in TOOLS:
        given["tools"] = TOOLS[path]
    if path == ANTHROPIC:
        given["thinking"] = {"type": "adaptive"}
    options = {LIMITS.get(path, "max_tokens"): 400} | given | options
    pair.compare(path, stream=True, **options)
    return pair.compare(path, **options)


@pytest.mark.parametrize("num_draft_tokens", [2, 8])
@pytest.mark.parametrize("text", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, ANTHROPIC, RESPONSES])
def test_markers_within_a_round(
    pair: Pair, path: str, text: str, num_draft_tokens: int
) -> None:
    reply = compare(pair, path, text, num_draft_tokens=num_draft_tokens)
    if path in (COMPLETIONS, CHAT) and num_draft_tokens == 8 and len(text) > 50:
        _, num_accepted = assert_counts_add_up(reply)
        assert num_accepted > 0.7 * reply.last["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, ANTHROPIC])
def test_a_stop_sequence_within_a_round(pair: Pair, path: str) -> None:
    name = "stop_sequences" if path == ANTHROPIC else "stop"
    for kind, stop in (
        ("text", ["STOP"]),
        ("text", ["b", "never"]),
        ("thought", ["STOP"]),
        ("thought", ["o a"]),
        ("all", ["y", "x"]),
    ):
        compare(pair, path, REPLIES[kind], num_draft_tokens=8, **{name: stop})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, ANTHROPIC, RESPONSES])
def test_a_limit_within_a_round(pair: Pair, path: str) -> None:
    name = LIMITS.get(path, "max_tokens")
    for num_tokens in range(1, 30, 6):
        options = {"num_draft_tokens": 8, name: num_tokens}
        reply = compare(pair, path, REPLIES["all"], **options)
        assert reply.status == 200


def test_log_probabilities_within_a_round(pair: Pair) -> None:
    for path in (COMPLETIONS, CHAT):
        compare(pair, path, REPLIES["text"], num_draft_tokens=8, logprobs=True)
