"""``json_schema=``, ``regex=`` and ``grammar=``, and ``--json-schema``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import batch_generate, generate, stream_generate
from mlx_lm.sample_utils import make_logits_processors

from mlx_optiq_ext import GrammarError
from tests.helpers import DEMO
from tests.patches.test_command_line import run, text_of

PROMPT = "def f():\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "n": {"type": "integer"},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
SPECULATION: list[dict[str, Any]] = [
    {},
    {"mtp": True},
    {"mtp": True, "num_draft_tokens": 2},
]


@pytest.fixture(scope="module")
def demo() -> Any:
    return mlx_lm.load(str(DEMO))


class Model:
    """What pydantic's models have."""

    @staticmethod
    def model_json_schema() -> Any:
        return SCHEMA


@pytest.mark.parametrize("options", SPECULATION)
def test_a_reply_is_what_the_schema_describes(
    demo: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    texts = {
        generate(*demo, PROMPT, json_schema=schema, max_tokens=60, **options)
        for schema in (SCHEMA, json.dumps(SCHEMA), path, Model)
    }
    assert texts == {'{"name": "name", "n": 1}'}


@pytest.mark.parametrize("options", SPECULATION)
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"\d{3}-[a-z]{4}"}, r"\d{3}-[a-z]{4}"),
        ({"grammar": 'root ::= ("yes" | "no") "!"'}, "(yes|no)!"),
        ({"grammar": 'start: "a" "b"~2'}, "abb"),
    ],
)
def test_a_reply_follows_a_regex_or_a_grammar(
    demo: Any, options: dict[str, Any], asked: dict[str, str], pattern: str
) -> None:
    assert re.fullmatch(pattern, generate(*demo, PROMPT, **asked, **options))


def test_a_reply_that_is_cut_off_says_so(demo: Any) -> None:
    responses = list(
        stream_generate(*demo, PROMPT, json_schema=SCHEMA, mtp=True, max_tokens=5)
    )
    assert responses[-1].finish_reason == "length"


def test_other_logits_processors_are_applied_as_well(demo: Any) -> None:
    bias = make_logits_processors({demo[1].encode("1")[0]: -100.0})
    text = generate(
        *demo, PROMPT, json_schema=SCHEMA, max_tokens=60, logits_processors=bias
    )
    assert "1" not in text


@pytest.mark.parametrize("options", SPECULATION)
def test_each_text_of_a_batch_is_what_it_is_alone(
    demo: Any, options: dict[str, Any]
) -> None:
    texts = (PROMPT, "import os\n", "class A:\n")
    prompts = [demo[1].encode(text) for text in texts]
    found = batch_generate(*demo, prompts, json_schema=SCHEMA, max_tokens=60, **options)
    alone = [generate(*demo, x, json_schema=SCHEMA, max_tokens=60) for x in texts]
    assert found.texts == alone


def test_a_prompt_may_be_tokens(demo: Any) -> None:
    tokens = demo[1].encode(PROMPT)
    texts = {
        generate(*demo, prompt, json_schema=SCHEMA, max_tokens=60, mtp=True)
        for prompt in (PROMPT, tokens, mx.array(tokens))
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json_schema": SCHEMA, "regex": "a"}, "json_schema and regex exclude"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": {"type": "x"}}, "Invalid type: x"),
        ({"regex": "("}, "unclosed group"),
        ({"max_thinking_tokens": -1}, "must not be negative, got -1"),
    ],
)
def test_mistakes_are_errors(demo: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*demo, PROMPT, **asked)


def test_without_llguidance_the_extra_is_named(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"mlx-optiq-ext\[structured\]"):
        generate(*demo, PROMPT, json_schema=SCHEMA)


def test_the_command_line_takes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    arguments = ("--model", DEMO, "--prompt", PROMPT, "--json-schema", path)
    texts = []
    for flags in ((), ("--mtp",)):
        code, output, _ = run("generate", *arguments, *flags)
        assert code == 0
        texts.append(text_of(output))
    assert texts[0] == texts[1]
    assert set(json.loads(texts[0])) == {"name", "n"}


@pytest.mark.parametrize(
    ("content", "message"), [("{", "argument --json-schema: "), ('{"type": "x"}', "x")]
)
def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    code, _, error = run(
        "generate", "--model", DEMO, "--prompt", PROMPT, "--json-schema", path
    )
    assert code != 0
    assert "Traceback" not in error
    assert message in error


def test_structured_errors_are_value_errors() -> None:
    assert issubclass(GrammarError, ValueError)
