"""What may come next in a reply, token by token, and taking tokens back."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext import GrammarError
from mlx_optiq_ext.grammars import (
    ConstraintProcessor,
    ReplyConstraint,
    ReplyRules,
    Shape,
    Source,
    masked,
)
from tests.helpers import DEMO

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"enum": ["big", "small"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TEXT = '{"name": "a}b", "size": "small"}'


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load(DEMO)


@pytest.fixture(scope="module")
def thinker() -> TokenizerWrapper:
    """A tokenizer whose model marks its thoughts."""
    inner: Any = PreTrainedTokenizerFast.from_pretrained(DEMO)
    inner.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(inner, eos_token_ids=[inner.eos_token_id])


def rules(tokenizer: Any, **options: Any) -> ReplyRules:
    return ReplyRules(Shape(**options), tokenizer)


def of_schema(tokenizer: Any, **options: Any) -> ReplyRules:
    return rules(tokenizer, answer=Source("json_schema", SCHEMA), **options)


def allowed(constraint: ReplyConstraint) -> set[int] | None:
    mask = constraint.mask()
    if mask is None:
        return None
    return {i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1}


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_reply_that_follows_its_grammar_is_allowed_and_then_ends(
    tokenizer: TokenizerWrapper,
) -> None:
    constraint = of_schema(tokenizer).begin()
    for token in encode(tokenizer, TEXT):
        found = allowed(constraint)
        assert found is not None
        assert token in found
        assert constraint.advance(token)
    assert allowed(constraint) == set(tokenizer.eos_token_ids)
    assert list(constraint.forced()) == list(tokenizer.eos_token_ids)
    assert constraint.advance(tokenizer.eos_token_id)
    assert constraint.is_idle(100)


def test_forced_tokens_are_the_only_ones_allowed(tokenizer: TokenizerWrapper) -> None:
    constraint = of_schema(tokenizer).begin()
    num_forced = 0
    for token in encode(tokenizer, TEXT):
        if forced := constraint.forced():
            num_forced += 1
            assert allowed(constraint) == {forced[0]}
        constraint.advance(token)
    assert num_forced > 5


def test_what_is_not_allowed_changes_nothing(tokenizer: TokenizerWrapper) -> None:
    constraint = of_schema(tokenizer).begin()
    before = constraint.mask()
    assert not constraint.advance(encode(tokenizer, "def")[0])
    assert not constraint.advance(tokenizer.eos_token_id)
    assert constraint.mask() == before


@pytest.mark.parametrize("seed", range(5))
def test_taking_back_leads_to_where_it_was(
    tokenizer: TokenizerWrapper, seed: int
) -> None:
    draw = random.Random(seed)
    constraint, masks, tokens = of_schema(tokenizer).begin(), [], list[int]()
    goal = [*encode(tokenizer, TEXT), tokenizer.eos_token_id, 5, 6]
    fresh = of_schema(tokenizer).begin()
    for token in goal:
        masks.append(fresh.mask())
        assert fresh.advance(token)
    for _ in range(60):
        assert constraint.mask() == masks[len(tokens)]
        ahead = goal[len(tokens) : len(tokens) + draw.randint(0, 6)]
        assert all(map(constraint.advance, ahead[:-1]))
        number = draw.randint(0, len(tokens + ahead[:-1]))
        constraint.roll_back(number)
        tokens = (tokens + ahead[:-1])[: len(tokens + ahead[:-1]) - number]


def test_a_thought_is_free_but_does_not_end_the_reply(
    thinker: TokenizerWrapper,
) -> None:
    constraint = of_schema(thinker).begin(in_thought=True)
    free = allowed(constraint)
    assert free is not None
    assert len(free) > 2000
    assert not free & set(thinker.eos_token_ids)
    for token in encode(thinker, "Let me see: def f()</think>\n\n"):
        assert constraint.advance(token)
    assert allowed(constraint) == {encode(thinker, '{"')[0]}


def test_a_model_may_begin_with_a_thought_of_its_own(
    thinker: TokenizerWrapper,
) -> None:
    constraint = of_schema(thinker).begin(may_think=True)
    (start,) = thinker.think_start_tokens
    assert start in (allowed(constraint) or ())
    assert constraint.advance(start)
    assert constraint.advance(encode(thinker, "def")[0])
    (end,) = thinker.think_end_tokens
    assert constraint.advance(end)
    assert start not in (allowed(constraint) or ())
    for token in encode(thinker, TEXT):
        assert constraint.advance(token)


def test_a_spent_thought_is_ended_by_the_marker(thinker: TokenizerWrapper) -> None:
    constraint = rules(thinker, max_thinking_tokens=3).begin(in_thought=True)
    assert constraint.is_idle(2)
    assert not constraint.is_idle(3)
    for token in (5, 6, 7):
        assert allowed(constraint) is None
        constraint.advance(token)
    assert allowed(constraint) == set(thinker.think_end_tokens)
    assert tuple(constraint.forced()) == thinker.think_end_tokens
    constraint.advance(thinker.think_end_tokens[0])
    assert allowed(constraint) is None
    # The model begins to think again.
    constraint.advance(thinker.think_start_tokens[0])
    for token in (5, 6, 7):
        constraint.advance(token)
    assert allowed(constraint) == set(thinker.think_end_tokens)


@pytest.mark.parametrize(
    ("prompt", "in_thought", "may_think"),
    [
        ("hello", False, True),
        ("hello<think>\n", True, True),
        ("hello<think>\n\n</think>\n\n", False, False),
    ],
)
def test_the_prompt_says_where_the_reply_begins(
    thinker: TokenizerWrapper, prompt: str, in_thought: bool, may_think: bool
) -> None:
    for given in (prompt, encode(thinker, prompt)):
        found = allowed(of_schema(thinker).begin_after(given))
        expected = of_schema(thinker).begin(in_thought=in_thought, may_think=may_think)
        assert found == allowed(expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("json_schema", {"type": "objekt"}), "^Invalid type: objekt"),
        (
            Source("json_schema", {"properties": {"a": {"items": {"type": "x"}}}}),
            r"^properties\.a\.items: Invalid type: x",
        ),
        (
            Source(
                "json_schema",
                {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{}, {"type": "x"}]}}},
            ),
            r"^\$defs\.a\.anyOf\.1: Invalid type: x",
        ),
        (
            Source("json_schema", {"type": "array", "uniqueItems": True}),
            "Unimplemented keys",
        ),
        (Source("json_schema", 5), "expected an object, got 5"),
        (Source("json_schema", False), "no value"),
        (Source("json_schema", {"enum": ["x" * 2_000_000]}), "too many"),
        (Source("regex", "(a"), "unclosed group"),
        (Source("regex", 5), "expected a text"),
        (Source("grammar", "start: nowhere"), "nowhere"),
        (Source("grammar", "what is this"), "neither Lark nor GBNF"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(
    tokenizer: TokenizerWrapper, source: Source, message: str
) -> None:
    with pytest.raises(GrammarError, match=message):
        rules(tokenizer, answer=source)


def test_keywords_that_cannot_be_enforced_are_ignored_if_not_strict(
    tokenizer: TokenizerWrapper,
) -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "uniqueItems": True}
    constraint = rules(
        tokenizer, answer=Source("json_schema", schema, is_strict=False)
    ).begin()
    assert all(map(constraint.advance, encode(tokenizer, "[1, 1]")))


@pytest.mark.parametrize(
    ("pattern", "text"), [(r"^\d{3}-x$", "123-x"), (r"a/b\$|c", "a/b$"), ("é+", "éé")]
)
def test_a_regex_has_to_match_all_of_the_text(
    tokenizer: TokenizerWrapper, pattern: str, text: str
) -> None:
    constraint = rules(tokenizer, answer=Source("regex", pattern)).begin()
    assert all(map(constraint.advance, encode(tokenizer, text)))
    assert set(tokenizer.eos_token_ids) <= (allowed(constraint) or set())


@pytest.mark.parametrize("vocab_size", [40, 64, 70, 96])
def test_masks_fit_vocabularies_of_any_size(vocab_size: int) -> None:
    mask = bytes([0b1010, 0, 0, 0, 0, 0, 0, 1 << 7])
    logits = mx.arange(2.0 * 3 * vocab_size).reshape(2, 3, vocab_size)
    found = masked(logits, [mask, None, None, None, None, mask])
    assert mx.array_equal(found[0, 1:], logits[0, 1:]).item()
    may = [i for i in range(vocab_size) if found[0, 0, i].item() > -mx.inf]
    assert may == [i for i in (1, 3, 63) if i < vocab_size]
    assert mx.array_equal(found[1, 2, 1], logits[1, 2, 1]).item()


def test_a_processor_follows_whoever_goes_back(tokenizer: TokenizerWrapper) -> None:
    prompt, goal = [7, 8], encode(tokenizer, TEXT)
    made = of_schema(tokenizer)
    processor, logits = ConstraintProcessor(made.begin()), mx.zeros((1, 2048))
    for number in (0, 1, 2, 5, 3, 3, 9, 1, len(goal)):
        fresh = ConstraintProcessor(made.begin())
        fresh(mx.array(prompt), logits)
        tokens = mx.array(prompt + goal[:number])
        assert mx.array_equal(processor(tokens, logits), fresh(tokens, logits)).item()


def test_a_processor_refuses_what_the_grammar_does_not_allow(
    tokenizer: TokenizerWrapper,
) -> None:
    processor, logits = ConstraintProcessor(of_schema(tokenizer).begin()), mx.zeros(
        (1, 9)
    )
    processor(mx.array([7]), logits)
    with pytest.raises(GrammarError, match="token 8 was drawn"):
        processor(mx.array([7, 8]), logits)
