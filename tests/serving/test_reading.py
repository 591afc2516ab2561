"""Thoughts, text and calls in the order in which they are generated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._events import (
    Call,
    CallPiece,
    CallStart,
    End,
    Event,
    Text,
    Thought,
    Token,
    Usage,
)
from mlx_optiq_ext.serving._reading import Reading, ReplyFormat, read_reply

from .scripted import TOKENIZER
from .written import (
    STREAMED,
    TOOLS,
    WRITERS,
    Response,
    as_json,
    as_xml,
    calls,
    cut,
    format_of,
    merged,
    parser_of,
    raw_events,
    read,
)


def call(name: str, **arguments: Any) -> str:
    return as_json(name, arguments)


def pieces(*events: Event) -> list[Event]:
    return [event for event in events if not isinstance(event, CallPiece)]


def shown(events: list[Event]) -> list[Event]:
    """Without what comes before the end of a call."""
    return [e for e in events if not isinstance(e, (CallPiece, CallStart))]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thoughts_text_and_calls_keep_their_order(size: int) -> None:
    reply = (
        f"<think>\nhm</think>\n\nfirst {call('f', x=1)}\nthen {call('g')}{call('h')}"
    )
    assert shown(read(cut(reply, size))) == [
        Thought("hm"),
        Text("first "),
        Call("f", {"x": 1}),
        Text("then "),
        Call("g", {}),
        Call("h", {}),
        End("stop"),
    ]


def test_a_call_begins_with_its_name_and_ends_with_its_arguments() -> None:
    events = raw_events(cut(call("f", x=["a", 1]) + call("g"), 3))
    assert pieces(*events) == [
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


# What is not the beginning of a call, and what is.


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "thought",
    [
        "I write `<tool_call>` and then JSON.",
        "<tool_call>{x}</tool_call>",
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call> is how',
        "<tool_call>\n<function=example>\n<parameter=x>\n1\n</parameter>\n</function>",
        "<tool_call>",
        "a < b",
    ],
)
@pytest.mark.parametrize("name", ["json_tools", "qwen3_coder"])
def test_prose_about_calls_in_a_thought_leaves_it_whole(
    name: str, thought: str, size: int
) -> None:
    events = read(cut(f"<think>{thought}</think>So", size), name=name)
    assert events == [Thought(thought), Text("So"), End("stop")]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "answer", ["Put it between `<tool_call>` and `</tool_call>`.", "<tool_call>hm"]
)
@pytest.mark.parametrize("name", STREAMED)
def test_prose_about_calls_in_an_answer_is_text(
    name: str, answer: str, size: int
) -> None:
    assert read(cut(answer, size), name=name) == [Text(answer), End("stop")]


def test_prose_is_held_back_no_longer_than_it_may_be_a_call() -> None:
    events = raw_events(["a <tool", "_call>", " ", "x", "y"])
    assert events == [Text("a "), Text("<tool_call> x"), Text("y"), End("stop")]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("name", STREAMED)
def test_a_call_in_a_thought_is_a_call_and_the_thought_goes_on(
    name: str, size: int
) -> None:
    reply = f"<think>so {WRITERS[name]('f', {'x': '</think>'})} done</think>Yes"
    assert shown(read(cut(reply, size), name=name)) == [
        Thought("so "),
        Call("f", {"x": "</think>"}),
        Thought("done"),
        Text("Yes"),
        End("stop"),
    ]


@pytest.mark.parametrize("name", STREAMED)
def test_without_tools_a_call_is_text(name: str) -> None:
    text = WRITERS[name]("f", {"x": 1})
    for tools in (None, []):
        assert read(cut(text, 3), name=name, tools=tools) == [Text(text), End("stop")]


def test_without_a_format_everything_is_text() -> None:
    text = f"\n<think>x</think>\n{call('f')}\n"
    events = read(cut(text, 3), format=None, keeps_space=True)
    assert events == [Text(text), End("stop")]


def test_a_call_of_an_unknown_tool_in_an_answer_is_the_clients_to_refuse() -> None:
    assert calls(read([call("nobody", x=1)])) == [Call("nobody", {"x": 1})]


# Calls that are not as they should be.


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    body = json.dumps({"name": "f", "arguments": arguments})
    for text in (body, '{"name": "f"}'):
        assert calls(read(cut(f"<tool_call>{text}</tool_call>", 2))) == [Call("f", {})]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "parameters": {"x": 1}}',
        '{"arguments": {"x": 1}, "name": "f"}',
        '{"id": "7", "type": "function", "name": "f", "arguments": {"x": 1}}',
        '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}',
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
        '[{"name": "f", "arguments": {"x": 1}}]',
        '{"name": "f", "arguments": {"x": 1}, "id": "7"}',
        '{"name": "f", "arguments": {"x": 1}, }',
        '{"name": "f", "arguments": {"x": 1}',
        '{"name": "f", "arguments": {"x": 1}}}',
        "<function=f><parameter=x>1</parameter></function>",
        '<function=f>{"x": 1}</function>',
        "call:f{x:1}",
    ],
)
@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_call_may_be_written_otherwise(name: str, body: str, size: int) -> None:
    format_ = format_of(name)
    start = format_.transitions["normal"][1][0]
    number = {"x": {"type": "integer"}}
    function = {"name": "f", "parameters": {"properties": number}}
    events = read(
        cut(f"{start}{body}{format_.call_end}So", size),
        name=name,
        tools=[{"type": "function", "function": function}],
    )
    assert shown(events) == [Call("f", {"x": 1}), Text("So"), End("stop")]


def test_line_breaks_in_strings_are_put_up_with() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "a\nb\t\\n"}}</tool_call>'
    events = read(cut(text, 3))
    assert calls(events) == [Call("f", {"x": "a\nb\t\n"})]
    # Clients are stricter.
    given = "".join(event.text for event in events if isinstance(event, CallPiece))
    assert json.loads(given) == {"x": "a\nb\t\n"}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "body",
    [
        *('{"name": "f", "argu', "7", "[1]", '{"name": 3}', '{"arguments": {}}'),
        *("", '{"name": "f", "x": 1}', '{"name": "f", "arguments": [1]}', "hello"),
    ],
)
def test_a_malformed_call_is_shown_and_ends_nothing(body: str, size: int) -> None:
    text = f"<tool_call>{body}</tool_call>"
    events = shown(read(cut(text + call("g"), size)))
    assert events == [Text(text), Call("g", {}), End("stop")]
    assert read(cut(text, size)) == [Text(text), End("stop")]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("json_tools", '{"name": "f", "arguments": {"x": yes}}</tool_call>'),
        ("json_tools", '{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
        ("gemma4", "call:f{x:{y},z:1}<tool_call|>"),
        ("gemma4", "call:f{x}<tool_call|>"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_call_that_began_well_and_is_malformed_is_an_error(
    name: str, body: str, size: int
) -> None:
    with pytest.raises(APIError, match="call of f is malformed"):
        read(cut(body, size), name=name, initial_state="tool")


# Ends.


def test_the_end_of_the_tokens_within_a_thought() -> None:
    assert read(["<think>h", "m"], "length") == [Thought("hm"), End("length")]
    assert read(["<think>h", "m"]) == [Thought("hm"), End("stop")]


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("name", STREAMED)
def test_a_call_that_is_cut_off_never_looks_finished(name: str, reason: str) -> None:
    text = WRITERS[name]("f", {"x": "some text", "y": "more"})
    for end in range(len("<|tool_call>"), text.index("more") + 2):
        events = read(cut(text[:end], 3), reason, name=name)
        assert events[-1] == End("length"), text[:end]
        assert not calls(events), text[:end]
        if not isinstance(events[0], CallStart):
            assert merged(events[:-1]) == [Text(text[:end])]


def test_what_was_certain_of_a_call_that_is_cut_off_is_given() -> None:
    for name in STREAMED:
        text = WRITERS[name]("f", {"x": "some text", "y": "more"})
        events = raw_events(cut(text[: text.index("more")], 3), name=name)
        assert events[0] == CallStart("f")
        given = "".join(e.text for e in events if isinstance(e, CallPiece))
        assert given.startswith('{"x": "some text"')


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("name", STREAMED)
def test_a_call_is_whole_if_only_markers_are_missing(name: str, reason: str) -> None:
    text = WRITERS[name]("f", {"x": "a"})
    text = text[: text.rindex("}") + 1] if "}" in text else text[:-12]
    events = read(cut(text, 3), reason, name=name)
    assert shown(events) == [Call("f", {"x": "a"}), End(reason)]  # type: ignore[arg-type]


def test_the_end_of_the_context_is_told_apart() -> None:
    events = read(["x"], "length", is_cut_by_context=True)
    assert events == [Text("x"), End("context")]
    assert read(["x"], "stop", is_cut_by_context=True)[-1] == End("stop")


def test_an_empty_reply_is_just_an_end() -> None:
    assert read([""]) == [End("stop")]
    assert read(["\n"]) == [End("stop")]


def test_the_start_of_a_marker_at_the_end_is_text() -> None:
    assert read(["a <", ""]) == [Text("a <"), End("stop")]


def test_one_call_ends_a_reply_that_may_have_no_more() -> None:
    events = read([call("f"), call("g")], one_call=True)
    assert shown(events) == [Call("f", {}), End("stop")]


# Stop sequences.


@pytest.mark.parametrize("size", range(1, 18))
def test_a_stop_sequence_ends_the_reply_where_it_first_starts(size: int) -> None:
    events = read(cut("one STOP two STOP", size), stop=["STOP"])
    assert events == [Text("one "), End("stop_sequence", "STOP")]


@pytest.mark.parametrize("size", range(1, 8))
def test_the_stop_sequence_that_is_complete_first_wins(size: int) -> None:
    events = read(cut("xabcdef", size), stop=["abcdef", "cd", "bcd"])
    assert events == [Text("xa"), End("stop_sequence", "bcd")]


def test_text_that_cannot_belong_to_a_stop_sequence_is_passed_on_at_once() -> None:
    events = raw_events(["a S", "T", "x", "S"], stop=["STOP"])
    assert events == [Text("a "), Text("STx"), Text("S"), End("stop")]


def test_a_stop_sequence_in_a_thought_or_in_arguments_does_not_count() -> None:
    reply = f"<think>STOP</think>x {call('f', y='STOP')} STOP"
    events = shown(read(cut(reply, 3), stop=["STOP"]))
    expected = [Thought("STOP"), Text("x "), Call("f", {"y": "STOP"})]
    assert events == [*expected, End("stop_sequence", "STOP")]


def test_a_stop_sequence_counts_in_text_that_looked_like_a_call() -> None:
    events = read(cut("<tool_call>{STOP}", 3), stop=["STOP"])
    assert events == [Text("<tool_call>{"), End("stop_sequence", "STOP")]


def test_text_on_both_sides_of_a_call_is_no_stop_sequence() -> None:
    events = shown(read(["ST", call("f"), "OP"], stop=["STOP"]))
    assert events == [Text("ST"), Call("f", {}), Text("OP"), End("stop")]


def test_nothing_is_generated_after_a_stop_sequence() -> None:
    responses = iter([Response("a STOP"), Response("b"), Response("c")])
    usage = Usage()
    reading = Reading(format_of("json_tools"), stop=["STOP"])
    events = [*read_reply(responses, reading, usage)]
    assert events[-1] == End("stop_sequence", "STOP")
    assert usage.num_output_tokens == 1
    assert next(responses) == Response("b")


# White space.


def test_white_space_is_dropped_only_where_it_sets_things_apart() -> None:
    assert read([" x ", "y "]) == [Text(" x y "), End("stop")]
    assert read(["<think>\n\n</think>\n\n x"]) == [Text("x"), End("stop")]
    assert read(["<think></think>\n\n x"]) == [Text("x"), End("stop")]


def test_an_empty_thought_that_the_prompt_began_leaves_no_line_breaks() -> None:
    for thought in ("", "\n", "\n\n"):
        events = read([f"{thought}</think>\n\nx"], initial_state="reasoning")
        assert events == [Text("x"), End("stop")]


def test_white_space_can_be_kept() -> None:
    text = f"<think>\nhm\n</think>\n\nso\n{call('f')}\n"
    assert shown(read(cut(text, 3), keeps_space=True)) == [
        Thought("\nhm\n"),
        Text("\n\nso\n"),
        Call("f", {}),
        Text("\n"),
        End("stop"),
    ]


# Beginnings, tokens, and what a tokenizer knows.


def test_a_reply_may_begin_within_a_thought_or_a_call() -> None:
    events = read(["\nhm</think>x"], initial_state="reasoning")
    assert events == [Thought("hm"), Text("x"), End("stop")]
    for text in (call("f"), as_xml("f", {})):
        begun = text.removeprefix("<tool_call>")
        events = read(cut(begun, 3), initial_state="tool")
        assert shown(events) == [Call("f", {}), End("stop")]
    assert read(["no"], initial_state="tool") == [Text("no"), End("stop")]


def test_tokens_are_counted_by_what_they_belong_to() -> None:
    usage = Usage()
    raw_events(["<think>", "a", "b", "</think>", "c"], usage=usage)
    assert (usage.num_output_tokens, usage.num_thinking_tokens) == (5, 3)


def test_tokens_come_before_the_events_of_their_text() -> None:
    responses = [Response("a", None, 1, -0.5), Response("b", "stop", 2, -1.0, [{}])]
    reading = Reading(format_of("json_tools"), gives_tokens=True)
    assert [*read_reply(responses, reading, Usage())] == [
        Token(1, -0.5, (), "a"),
        Text("a"),
        Token(2, -1.0, [{}], "b"),
        Text("b"),
        End("stop"),
    ]


def tokenizer(name: str) -> TokenizerWrapper:
    """One of a model that writes its calls as one of mlx-lm's parsers reads them."""
    inner = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|im_end|>")
    parser = parser_of(name)
    return TokenizerWrapper(
        inner,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )


@pytest.mark.skipif(
    not hasattr(TextStateMachine, "split"), reason="this mlx-lm splits no text"
)
def test_text_is_split_as_by_mlx_lm() -> None:
    text = "a<think>b</thin</think>c</think><think>d"
    machine = make_text_state_machine(tokenizer("json_tools"))
    _, segments = TextStateMachine.split(machine.make_state("normal"), text)
    kinds = {"normal": Text, "reasoning": Thought}
    expected = [kinds[state](piece) for state, piece in segments if piece]
    form = ReplyFormat.of(tokenizer("json_tools"))
    assert read(cut(text, 3), format=form) == [*expected, End("stop")]


@pytest.mark.parametrize("name", STREAMED)
def test_a_tokenizer_tells_how_calls_are_marked(name: str) -> None:
    form = ReplyFormat.of(tokenizer(name))
    assert form == format_of(name)
    reply = WRITERS[name]("f", {"x": "a"})
    events = shown(read(cut(reply, 3), format=form))
    assert events == [Call("f", {"x": "a"}), End("stop")]


def test_parts_that_a_template_shows_nobody_are_left_out() -> None:
    form = ReplyFormat(
        {
            "header": [("self|", "reasoning"), ("user|", "normal"), ("<c>", "tool")],
            "reasoning": [("<eom>", "header")],
            "normal": [("<eom>", "header")],
        },
        "</c>",
        format_of("json_tools").parser,
    )
    text = 'self|hm<eom>to=<c>{"name": "f"}</c>to=user|x'
    events = read(cut(text, 2), format=form, initial_state="header")
    assert shown(events) == [Thought("hm"), Call("f", {}), Text("x"), End("stop")]


def test_the_tools_are_those_of_the_request() -> None:
    assert calls(read([call("f")], tools=TOOLS)) == [Call("f", {})]
