from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers import gemma4, json_tools, qwen3_coder

from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._events import (
    Call,
    CallPiece,
    CallStart,
    End,
    Event,
    Text,
    Thought,
    Usage,
)
from mlx_optiq_ext.serving._reply import Splitter, read_reply, trim

STATES = TextStateMachine(
    {
        "normal": [("<think>", "reasoning"), ("<tool_call>", "tool")],
        "reasoning": [("</think>", "normal"), ("<tool_call>", "tool")],
        "tool": [("</tool_call>", "normal")],
    }
)


class Response(NamedTuple):
    text: str
    finish_reason: str | None = None


def parse(text: str, tools: Any) -> Any:
    return json.loads(text)


def call(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{body}</tool_call>"


def read(
    pieces: Iterable[str],
    finish_reason: str = "stop",
    state: str = "normal",
    stop: Iterable[str] = (),
    **options: Any,
) -> list[Event]:
    """The events of a reply, neighbours of one kind joined."""
    texts = [*pieces]
    responses = [Response(text) for text in texts[:-1]]
    responses.append(Response(texts[-1], finish_reason))
    splitter = Splitter(STATES, state, parse, None, stop)
    events: list[Event] = []
    for event in trim(read_reply(responses, splitter, Usage(), **options)):
        last = events[-1] if events else None
        if isinstance(event, (Text, Thought)) and type(event) is type(last):
            events[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            events.append(event)
    return events


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thoughts_text_and_calls_keep_their_order(size: int) -> None:
    reply = (
        f"<think>\nhm</think>\n\nfirst {call('a', x=1)}\nthen {call('b')}{call('c')}"
    )
    assert read(cut(reply, size)) == [
        Thought("hm"),
        Text("first "),
        Call("a", {"x": 1}),
        Text("then "),
        Call("b", {}),
        Call("c", {}),
        End("stop"),
    ]


def test_arguments_keep_unicode_quotes_and_nesting() -> None:
    arguments = {"text": 'ü "q" \\ 😀\n', "deep": {"list": [1, None, {"x": True}]}}
    assert read([call("f", **arguments)])[0] == Call("f", arguments)


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    body = json.dumps({"name": "f", "arguments": arguments})
    assert read([f"<tool_call>{body}</tool_call>"])[0] == Call("f", {})
    assert read(['<tool_call>{"name": "f"}</tool_call>'])[0] == Call("f", {})


@pytest.mark.parametrize(
    "body", ['{"name": "f", "argu', "7", "[1]", '{"name": 3}', '{"arguments": {}}']
)
def test_a_malformed_call_is_shown_and_ends_nothing(body: str) -> None:
    events = read([f"<tool_call>{body}</tool_call>", call("g")])
    assert events == [Text(body), Call("g", {}), End("stop")]


def test_a_stop_sequence_ends_the_reply_where_it_starts() -> None:
    events = read(["one S", "TO", "P two", "never"], stop=["STOP"])
    assert events == [Text("one "), End("stop_sequence", "STOP")]


def test_a_stop_sequence_in_a_thought_or_in_arguments_does_not_count() -> None:
    reply = f"<think>STOP</think>x {call('f', y='STOP')} STOP"
    events = read([reply], stop=["STOP"])
    expected = [Thought("STOP"), Text("x "), Call("f", {"y": "STOP"})]
    assert events == [*expected, End("stop_sequence", "STOP")]


def test_text_on_both_sides_of_a_call_is_no_stop_sequence() -> None:
    events = read(["ST", call("f"), "OP"], stop=["STOP"])
    assert events == [Text("ST"), Call("f", {}), Text("OP"), End("stop")]


def test_nothing_is_generated_after_a_stop_sequence() -> None:
    pieces = iter([Response("a STOP"), Response("b"), Response("c")])
    splitter = Splitter(STATES, "normal", stop=["STOP"])
    usage = Usage()
    assert [*read_reply(pieces, splitter, usage)][-1] == End("stop_sequence", "STOP")
    assert usage.num_output_tokens == 1
    assert next(pieces) == Response("b")


def test_the_end_of_the_tokens_within_a_thought() -> None:
    assert read(["<think>h", "m"], "length") == [Thought("hm"), End("length")]


def test_the_end_of_the_tokens_within_a_call() -> None:
    events = read(["<tool_call>", '{"name": "f", "ar'], "length")
    assert events == [Text('{"name": "f", "ar'), End("length")]


def test_the_end_of_the_context_is_told_apart() -> None:
    events = read(["x"], "length", is_cut_by_context=True)
    assert events == [Text("x"), End("context")]
    assert read(["x"], "stop", is_cut_by_context=True)[-1] == End("stop")


def test_an_empty_reply_is_just_an_end() -> None:
    assert read([""]) == [End("stop")]
    assert read(["\n"]) == [End("stop")]


def test_the_start_of_a_marker_at_the_end_is_text() -> None:
    assert read(["a <", ""]) == [Text("a <"), End("stop")]


def test_white_space_is_dropped_only_where_it_sets_things_apart() -> None:
    assert read([" x ", "y "]) == [Text(" x y "), End("stop")]
    events = read(["<think>\n\n</think>\n\n x"])
    assert events == [Text("x"), End("stop")]


def test_a_reply_may_begin_within_a_thought_or_a_call() -> None:
    events = read(["hm</think>x"], state="reasoning")
    assert events == [Thought("hm"), Text("x"), End("stop")]
    events = read([call("f").removeprefix("<tool_call>")], state="tool")
    assert events == [Call("f", {}), End("stop")]


def test_one_call_ends_a_reply_that_may_have_no_more() -> None:
    events = read([call("f"), call("g")], one_call=True)
    assert events == [Call("f", {}), End("stop")]


def stream(
    text: str, parser: Any = json_tools, finish_reason: str = "stop"
) -> list[Event]:
    """The events of a reply that is nothing but calls, as they are streamed."""
    splitter = Splitter(STATES, "tool", parser.parse_tool_call, streams_calls=True)
    responses = [Response(piece) for piece in cut(text, 3)]
    responses[-1] = responses[-1]._replace(finish_reason=finish_reason)
    return [*read_reply(responses, splitter, Usage())]


def test_the_pieces_of_a_call_come_before_it() -> None:
    text = call("f", x=["a", 1]).removeprefix("<tool_call>") + call("g")
    events = stream(text)
    assert [e for e in events if not isinstance(e, CallPiece)] == [
        CallStart("f"),
        Call("f", {"x": ["a", 1]}),
        CallStart("g"),
        Call("g", {}),
        End("stop"),
    ]
    first = events[1 : events.index(Call("f", {"x": ["a", 1]}))]
    assert len(first) > 2
    assert "".join(e.text for e in first if isinstance(e, CallPiece)) == (
        '{"x": ["a", 1]}'
    )


def test_calls_between_the_same_markers_follow_the_streamed_one() -> None:
    events = stream('call:f{x:1}call:g{y:<|"|>z<|"|>}</tool_call>', gemma4)
    calls = [e for e in events if isinstance(e, (CallStart, Call))]
    assert calls == [CallStart("f"), Call("f", {"x": 1}), Call("g", {"y": "z"})]


def test_a_call_that_began_well_and_is_malformed_is_an_error() -> None:
    for text, parser in (
        ('{"name": "f", "arguments": {"x": 1}, }</tool_call>', json_tools),
        ("<function=f><parameter=x>1</parameter></tool_call>", qwen3_coder),
        ("call:f{x:yes}</tool_call>", gemma4),
    ):
        with pytest.raises(APIError, match="call of f is malformed"):
            stream(text, parser)


def test_a_streamed_call_that_is_cut_off_stays_open() -> None:
    text = '{"name": "f", "arguments": {"x": "ab'
    events = stream(text, finish_reason="length")
    assert (events[0], events[-1]) == (CallStart("f"), End("length"))
    assert not any(isinstance(event, (Call, Text)) for event in events)
    with pytest.raises(APIError):
        stream(text)
    # It is whole if only the marker is missing.
    events = stream(text + '"}}', finish_reason="length")
    assert events[-2:] == [Call("f", {"x": "ab"}), End("length")]


def test_tokens_of_thoughts_are_counted() -> None:
    responses = [Response(text) for text in ("<think>", "a", "b", "</think>", "c")]
    usage = Usage()
    list(read_reply(responses, Splitter(STATES, "normal"), usage))
    assert usage.num_output_tokens == 5
    assert usage.num_thinking_tokens == 3
