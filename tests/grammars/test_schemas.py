"""Replies to schemas of many kinds: all valid, and the same with and without drafts."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from tests.grammars.schemas import SCHEMAS
from tests.helpers import DEMO

MAX_TOKENS = 120

FORMATS = jsonschema.FormatChecker(("email", "ipv4", "ipv6", "uuid"))


@FORMATS.checks("date")
def is_date(value: Any) -> bool:
    """By the grammar of RFC 3339, which knows no calendar."""
    pattern = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    return not isinstance(value, str) or re.fullmatch(pattern, value) is not None


@pytest.fixture(scope="module")
def demo() -> Any:
    return mlx_lm.load(str(DEMO))


def reply(demo: Any, name: str, **options: Any) -> tuple[str, str, list[int]]:
    """Text, finish reason and tokens."""
    responses = list(
        stream_generate(
            *demo,
            f"# A {name.replace('_', ' ')} in JSON:\n",
            max_tokens=MAX_TOKENS,
            json_schema=SCHEMAS[name],
            **options,
        )
    )
    text = "".join(response.text for response in responses)
    return text, responses[-1].finish_reason, [each.token for each in responses]


def check(name: str, text: str, finish_reason: str) -> None:
    if finish_reason != "length":
        jsonschema.validate(
            json.loads(text),
            SCHEMAS[name],
            jsonschema.Draft202012Validator,
            format_checker=FORMATS,
        )


def test_there_are_many() -> None:
    assert len(SCHEMAS) >= 60


@pytest.mark.parametrize("name", SCHEMAS)
def test_greedy_replies_are_valid_and_the_same_without_drafts(
    demo: Any, name: str
) -> None:
    plain = reply(demo, name)
    check(name, *plain[:2])
    assert reply(demo, name, mtp=True) == plain


@pytest.mark.parametrize("name", SCHEMAS)
def test_sampled_replies_are_valid(demo: Any, name: str) -> None:
    mx.random.seed(len(name))
    options = {"sampler": make_sampler(1.0), "mtp": True, "num_draft_tokens": 2}
    text, reason, _ = reply(demo, name, **options)
    check(name, text, reason)


def test_most_replies_are_not_cut_off(demo: Any) -> None:
    reasons = [reply(demo, name, mtp=True)[1] for name in list(SCHEMAS)[::4]]
    assert reasons.count("stop") > 0.8 * len(reasons)
