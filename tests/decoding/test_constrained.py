"""Sequences that follow a grammar: what is drafted, and for whom else, is not seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import GrammarError, SpeculationStats
from mlx_optiq_ext.decoding import (
    SequenceOptions,
    SpeculativeBatchGenerator,
    spec_generate_step,
)
from mlx_optiq_ext.grammars import ConstraintProcessor, ReplyRules, Shape, Source
from mlx_optiq_ext.mixins import attach_mtp
from tests.decoding.test_acceptance import TOLERATED_P_VALUE, chi_square_tail
from tests.helpers import (
    CHANGING,
    DEMO,
    ScriptedDrafter,
    assert_same_cache,
    assert_same_tokens,
    changing_depth,
    often_right,
)

PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 16},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "favourite_colours": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "maxItems": 3,
        },
    },
    "required": ["full_name", "age_in_years", "favourite_colours"],
    "additionalProperties": False,
}
PROMPTS = ("def main():\n", "import os\n", "class Queue:\n")
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, Any]:
    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def rules(demo: Any) -> ReplyRules:
    return ReplyRules(Shape(Source("json_schema", PERSON)), demo[1])


def until_the_end(demo: Any, steps: Iterator[Any]) -> list[Any]:
    found = []
    for step in steps:
        found.append(step)
        if step[0] in demo[1].eos_token_ids:
            break
    steps.close()
    return found


def generated(demo: Any, rules: ReplyRules, step: Any, **options: Any) -> list[Any]:
    model, tokenizer = demo
    others = options.pop("logits_processors", [])
    prompt = mx.array(tokenizer.encode(options.pop("prompt", PROMPTS[0])))
    processors = [ConstraintProcessor(rules.begin()), *others]
    options = {"max_tokens": MAX_TOKENS, **options}
    return until_the_end(
        demo, step(prompt, model, logits_processors=processors, **options)
    )


@pytest.mark.parametrize("num_draft_tokens", ["auto", 1, 2, 5, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 7},
        {"logits_processors": make_logits_processors(repetition_penalty=1.3)},
        {"logits_processors": make_logits_processors({95: 3.0, 4: -2.0})},
        {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12},
    ],
)
def test_greedy_replies_are_those_of_plain_decoding(
    demo: Any, rules: ReplyRules, num_draft_tokens: Any, options: dict[str, Any]
) -> None:
    plain = generated(demo, rules, generate_step, **options)
    speculative = generated(
        demo, rules, spec_generate_step, num_draft_tokens=num_draft_tokens, **options
    )
    assert_same_tokens(plain, speculative)


def test_whatever_is_drafted_and_however_the_depth_changes(
    demo: Any, rules: ReplyRules
) -> None:
    plain = generated(demo, rules, generate_step)
    script = [token for token, _ in plain]
    for is_right in (often_right, lambda _: False, lambda _: True):
        drafter: Any = ScriptedDrafter(script, 2048, is_right)
        with changing_depth(CHANGING):
            found = generated(demo, rules, spec_generate_step, drafter=drafter)
        assert_same_tokens(plain, found)


def test_the_cache_is_that_of_plain_decoding(demo: Any, rules: ReplyRules) -> None:
    caches = [make_prompt_cache(demo[0]) for _ in range(2)]
    generated(demo, rules, generate_step, prompt_cache=caches[0], max_tokens=23)
    generated(demo, rules, spec_generate_step, prompt_cache=caches[1], max_tokens=23)
    assert_same_cache(caches[0], caches[1][: len(caches[0])])


def test_certain_tokens_are_drafts_that_are_right(demo: Any, rules: ReplyRules) -> None:
    stats, wrong = SpeculationStats(), ScriptedDrafter([0] * 200, 2048, lambda _: False)
    options: Any = {"drafter": wrong, "stats": stats}
    with changing_depth((0,)):
        found = generated(demo, rules, spec_generate_step, **options)
    assert stats.num_accepted == stats.num_drafted > len(found) / 4


def test_drafts_follow_the_grammar(demo: Any, rules: ReplyRules) -> None:
    """A head that knows nothing is right wherever the grammar leaves one way to go."""
    nothing: Any = ScriptedDrafter([0] * 200, 2048, lambda _: False)
    stats = SpeculationStats()
    generated(
        demo,
        rules,
        spec_generate_step,
        drafter=nothing,
        num_draft_tokens=2,
        stats=stats,
    )
    assert stats.num_accepted > 10


@pytest.mark.parametrize("seed", range(3))
def test_one_seed_gives_one_text(demo: Any, rules: ReplyRules, seed: int) -> None:
    options = {"seed": seed, "sampler": make_sampler(1.0, top_p=0.95)}
    texts = {
        tuple(
            token
            for token, *_ in generated(
                demo, rules, spec_generate_step, num_draft_tokens=number, **options
            )
        )
        for number in ("auto", 1, 3, 8)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_samples_have_the_distribution_of_plain_decoding(
    demo: Any, num_draft_tokens: int
) -> None:
    short = ReplyRules(Shape(Source("regex", "(a|b|cd?){2}[0-4]")), demo[1])
    counts: list[Counter[str]] = []
    for step in (generate_step, spec_generate_step):
        drafts = {} if step is generate_step else {"num_draft_tokens": num_draft_tokens}
        mx.random.seed(num_draft_tokens)
        replies = [
            generated(demo, short, step, sampler=make_sampler(1.0), **drafts)
            for _ in range(150)
        ]
        texts = (demo[1].decode([t for t, *_ in reply[:-1]]) for reply in replies)
        counts.append(Counter(text[:2] for text in texts))
    pairs = [(counts[0][kind], counts[1][kind]) for kind in counts[0] | counts[1]]
    # Two samples of one size, by Pearson's test, without what is too rare for it.
    usual = [(one, other) for one, other in pairs if one + other >= 10]
    statistic = sum((one - other) ** 2 / (one + other) for one, other in usual)
    assert len(usual) > 2
    assert chi_square_tail(statistic, len(usual) - 1) > TOLERATED_P_VALUE


def test_sequences_with_and_without_a_grammar_share_passes(
    demo: Any, rules: ReplyRules
) -> None:
    model, tokenizer = demo
    generator = SpeculativeBatchGenerator(
        model, stop_tokens=[[token] for token in tokenizer.eos_token_ids]
    )
    prompts = [tokenizer.encode(prompt) for prompt in (*PROMPTS, PROMPTS[0])]
    processors = [[ConstraintProcessor(rules.begin())] for _ in PROMPTS] + [[]]
    uids = generator.insert(prompts, [MAX_TOKENS] * 4, logits_processors=processors)
    # One of them asks for no drafts.
    for uid, number in zip(uids, (2, "auto", 0, 3), strict=True):
        generator.set_options(uid, SequenceOptions(number))
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    for uid, prompt in zip(uids, PROMPTS, strict=False):
        plain = generated(demo, rules, generate_step, prompt=prompt)
        assert found[uid] == [token for token, _ in plain]
    prompt = mx.array(prompts[3])
    free = generate_step(prompt, model, max_tokens=MAX_TOKENS)
    assert found[uids[3]] == [t for t, _ in until_the_end(demo, free)]


def test_a_sampler_that_ignores_the_grammar_ends_its_sequence(
    demo: Any, rules: ReplyRules
) -> None:
    def stubborn(logprobs: mx.array) -> mx.array:
        return mx.full(logprobs.shape[:1], 7, mx.uint32)

    for number in ("auto", 2):
        with pytest.raises(GrammarError, match="token 7 was drawn"):
            generated(
                demo,
                rules,
                spec_generate_step,
                sampler=stubborn,
                num_draft_tokens=number,
            )


def test_replies_are_what_was_asked_for(demo: Any, rules: ReplyRules) -> None:
    found = generated(demo, rules, spec_generate_step)
    value = json.loads(demo[1].decode([token for token, *_ in found[:-1]]))
    assert set(value) == set(PERSON["properties"])


class TooComplex:
    """A constraint that cannot go on after some tokens."""

    def __init__(self, num_tokens: int):
        self.num_left = num_tokens

    def mask(self) -> bytes | None:
        if self.num_left <= 0:
            raise GrammarError("the grammar is too complex")
        return None

    def forced(self) -> list[int]:
        return []

    def advance(self, token: int) -> bool:
        self.num_left -= 1
        return True

    def roll_back(self, num_tokens: int) -> None:
        self.num_left += num_tokens

    def is_idle(self, num_tokens: int) -> bool:
        return False


@pytest.mark.parametrize("num_draft_tokens", ["auto", 1, 2, 3, 8])
def test_a_grammar_that_turns_out_too_complex_ends_its_own_sequence(
    demo: Any, num_draft_tokens: Any
) -> None:
    model, tokenizer = demo
    generator = SpeculativeBatchGenerator(
        model,
        num_draft_tokens=num_draft_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
    )
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    processors: list[Any] = [[ConstraintProcessor(TooComplex(9))], []]
    uids = generator.insert(prompts, [MAX_TOKENS] * 2, logits_processors=processors)
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    errors = []
    while True:
        try:
            responses = generator.next_generated()
        except GrammarError as error:
            errors.append(error)
            continue
        if not responses:
            break
        for response in responses:
            found[response.uid].append(response.token)
    assert len(errors) == 1
    assert len(found[uids[0]]) == 9
    free = generate_step(mx.array(prompts[1]), model, max_tokens=MAX_TOKENS)
    assert found[uids[1]] == [token for token, _ in until_the_end(demo, free)]


def test_copies_of_the_context_follow_the_grammar(demo: Any, rules: ReplyRules) -> None:
    prompt = '{"full_name": "name", "age_in_years": 100, "favourite' * 2
    plain = generated(demo, rules, generate_step, prompt=prompt)
    found = generated(
        demo, rules, spec_generate_step, prompt=prompt, prompt_lookup=True
    )
    assert_same_tokens(plain, found)
