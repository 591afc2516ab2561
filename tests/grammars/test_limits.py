"""Grammars that are made to be expensive: a bounded time, and an error."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_optiq_ext import GrammarError
from mlx_optiq_ext.grammars import ReplyRules, Shape, Source
from mlx_optiq_ext.grammars._trial import MAX_CPU_SECONDS, check_cost
from tests.helpers import DEMO

REMAINDERS = {"type": "integer", "multipleOf": 999983}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def properties(number: int) -> dict[str, Any]:
    names = {f"p{index}": {"type": "string"} for index in range(number)}
    return {"type": "object", "properties": names}


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load(DEMO)


def rules(tokenizer: TokenizerWrapper, source: Source) -> ReplyRules:
    return ReplyRules(Shape(source), tokenizer)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_what_takes_too_long_is_ended(tokenizer: TokenizerWrapper) -> None:
    before = cpu_seconds()
    with pytest.raises(GrammarError, match="too complex"):
        rules(tokenizer, Source("json_schema", REMAINDERS))
    assert cpu_seconds() - before < MAX_CPU_SECONDS + 2


@pytest.mark.parametrize(
    "source",
    [
        Source("json_schema", nested(2000)),
        Source("json_schema", nested(300)),
        Source(
            "json_schema", {"enum": [f"number {i} of many" for i in range(100_000)]}
        ),
        Source(
            "json_schema",
            {
                "allOf": [
                    {"anyOf": [properties(i + j + 1) for j in range(8)]}
                    for i in range(12)
                ]
            },
        ),
        Source("grammar", "start: T\nT: /(.*a.{12})/ & /(.*b.{12})/ & ~/(.*c.{12})/"),
        Source("regex", "x" * 2_000_000),
    ],
)
def test_what_is_too_large_is_refused(
    tokenizer: TokenizerWrapper, source: Source
) -> None:
    with pytest.raises(GrammarError):
        rules(tokenizer, source).begin().mask()


@pytest.mark.parametrize(
    "source",
    [
        Source("regex", "(a+)+b"),
        Source("regex", "(.*a.*){20}"),
        Source("regex", "(a|b)*a(a|b){25}"),
        Source("regex", "((a{1,100}){1,100}){1,100}"),
        Source("json_schema", {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]$"}),
        Source("json_schema", {"type": "string", "maxLength": 10_000_000}),
        Source("json_schema", {"enum": [f"value {i}" for i in range(5000)]}),
        Source("json_schema", {"type": "array", "items": nested(5), "minItems": 99999}),
        Source("grammar", 'start: s\ns: s s s s | "a" | "aa" | ""'),
        Source("json_schema", nested(60)),
    ],
)
def test_what_only_looks_expensive_is_followed(
    tokenizer: TokenizerWrapper, source: Source
) -> None:
    constraint = rules(tokenizer, source).begin()
    for _ in range(30):
        mask = constraint.mask()
        assert mask is not None
        found = (i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1)
        token = next(found)
        assert constraint.advance(token)
        if token in tokenizer.eos_token_ids:
            break


def test_what_passed_once_is_not_tried_again() -> None:
    grammar = "start: /[0-9]+/ // multipleOf"
    check_cost(grammar)
    before = cpu_seconds()
    check_cost(grammar)
    assert cpu_seconds() == before
