from __future__ import annotations

import importlib
import json
import random
from typing import Any

import pytest

from mlx_optiq_ext.serving._call_streams import CallStream, Parser, stream_call

PROPERTIES = {
    "text": {"type": "string"},
    "path": {"type": "string"},
    "number": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "list": {"type": "array"},
    "deep": {"type": "object"},
    "any": {"description": "no type"},
}
TOOLS = [{"function": {"name": "f", "parameters": {"properties": PROPERTIES}}}]

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"text": ""},
    {"text": "plain"},
    {"text": 'two\nlines, "quotes", \\ back and ü 😀 \u2028\t'},
    {"text": "{[}]", "path": "a, b: {c: 1}"},
    {"number": -12, "ratio": 0.5, "flag": True, "list": [1, [2, "x"], {"y": None}]},
    {"deep": {"text": "in", "list": [{"a": 1}, {}]}, "text": "after"},
    {"text": "x" * 300, "path": "/p"},
    {"unknown": "nobody declared it", "any": "text"},
]


def parser_of(name: str) -> Parser:
    return importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as models write it in a format."""
    return {"json_tools": as_json, "qwen3_coder": as_xml, "gemma4": as_gemma}[name](
        arguments
    )


def as_json(arguments: dict[str, Any]) -> str:
    call = {"name": "f", "arguments": arguments}
    return f"\n{json.dumps(call, ensure_ascii=False)}\n"


def as_xml(arguments: dict[str, Any]) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}"
        "\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"\n<function=f>\n{parameters}</function>\n"


def as_gemma(arguments: dict[str, Any]) -> str:
    def literal(value: Any) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, list):
            return f"[{','.join(map(literal, value))}]"
        if isinstance(value, dict):
            pairs = (f"{key}:{literal(item)}" for key, item in value.items())
            return "{" + ",".join(pairs) + "}"
        return json.dumps(value)

    return f"call:f{literal(arguments)}"


def stream_of(name: str) -> CallStream:
    stream = stream_call(parser_of(name), TOOLS)
    assert stream is not None
    return stream


def streamed(name: str, text: str, sizes: list[int]) -> Any:
    """What the pieces of a call add up to, the text cut into pieces of these sizes."""
    stream, json_text, position = stream_of(name), "", 0
    while position < len(text):
        size = sizes[position % len(sizes)]
        json_text += stream.feed(text[position : position + size])
        position += size
    assert stream.name == "f"
    return json.loads(json_text + stream.close())


FORMATS = ["json_tools", "qwen3_coder", "gemma4"]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_pieces_are_what_the_parser_of_mlx_lm_reads(
    name: str, arguments: dict[str, Any]
) -> None:
    text = written(name, arguments)
    expected = parser_of(name)(text, TOOLS)
    assert expected == {"name": "f", "arguments": arguments}
    dice = random.Random(0)
    cuts = [[1], [2], [3], [7], [1000], *([dice.randint(1, 9)] * 5 for _ in range(20))]
    for sizes in cuts:
        assert streamed(name, text, sizes) == arguments


@pytest.mark.parametrize(
    "value",
    [
        *(
            "null",
            "NULL",
            "nullable",
            "nul",
            "n",
            "null\nx",
            " null",
            "\n",
            "\n\nx\n\n",
        ),
        *("x</parameter", "<", "<parameter", "a</function>b", "12", "[1]", "true"),
    ],
)
@pytest.mark.parametrize("key", ["text", "unknown", "any"])
def test_strings_that_look_like_something_else(key: str, value: str) -> None:
    text = as_xml({key: value, "number": 1})
    expected = parser_of("qwen3_coder")(text, TOOLS)["arguments"]
    for size in (1, 2, 5, 1000):
        assert streamed("qwen3_coder", text, [size]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<function=f><parameter=text>x</parameter></function>",
        "<function=f\n><parameter=text\nx</parameter></function>",
        "so <function=f>hm<parameter=text>x</parameter>hm<parameter=text>y</parameter>"
        "hm</function>",
    ],
)
def test_what_the_parser_of_mlx_lm_puts_up_with(text: str) -> None:
    expected = parser_of("qwen3_coder")(text, TOOLS)["arguments"]
    for size in (1, 4, 1000):
        assert streamed("qwen3_coder", text, [size]) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_string_is_not_waited_for(name: str) -> None:
    text = written(name, {"text": "a" * 500})
    stream = stream_of(name)
    assert len(stream.feed(text[:300])) > 200
    assert all(stream.feed(character) for character in text[300:400])


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_known_of_what_is_no_call(name: str) -> None:
    stream = stream_of(name)
    assert not stream.feed("I would call f{x} if I could")
    assert stream.name is None


def test_other_formats_have_no_stream() -> None:
    assert stream_call(parser_of("mistral"), TOOLS) is None
    assert stream_call(None, TOOLS) is None
