"""What can be copied: only what stands in the text, and what is known of its worth."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from mlx_optiq_ext.drafters import Lookup
from mlx_optiq_ext.drafters._lookup import MatchRates
from mlx_optiq_ext.drafters._ngram_index import MAX_MATCH, MIN_MATCH
from tests.families import tiny

TEXT = [5, 17, 3, 29, 41, 8, 11, 60, 2, 33]


def lookup_of(tokens: list[int]) -> Lookup:
    lookup = Lookup.of([], 0)
    lookup.read(tokens)
    return lookup


def held(cache: list[Any]) -> list[int]:
    """The tokens of the index that rests with entries."""
    _, index = vars(cache[0])["_optiq_index"]
    return [index[position] for position in range(len(index))]


def test_what_followed_the_end_before_is_copied() -> None:
    lookup = lookup_of([*TEXT, 9, *TEXT[:4]])
    assert lookup.copy(3) == TEXT[4:7]
    assert len(lookup.chances(3)) == 3
    lookup.follow([1])
    assert lookup.copy(3) == lookup.chances(3) == []


def test_a_copy_goes_on_where_the_text_does_and_ends_where_it_does_not() -> None:
    lookup = lookup_of([*TEXT, 9, *TEXT[:2]])
    lookup.follow(TEXT[2:5])
    assert lookup.copy(2) == TEXT[5:7]
    lookup.follow([TEXT[5], 77])
    assert lookup.copy(2) == []
    lookup.follow(TEXT[1:4])
    assert lookup.copy(2) == TEXT[4:6]


def test_longer_matches_are_worth_more_until_the_text_says_otherwise() -> None:
    rates = MatchRates()
    before = rates.chances(MIN_MATCH, 12)
    assert before == sorted(before)
    for _ in range(20):
        rates.add(4, False)
    after = rates.chances(MIN_MATCH, 12)
    assert after[:2] == before[:2]
    assert after[2] < 0.1
    for _ in range(100):
        rates.add(MAX_MATCH + 5, True)
    assert rates.chances(MAX_MATCH, 1)[0] > 0.97


def test_it_is_learnt_what_a_match_is_worth_where_nothing_is_drafted() -> None:
    draw = random.Random(0)
    wrong = lookup_of([token for token in range(90) for _ in range(1)])
    for _ in range(60):
        start = draw.randrange(80)
        # Each time two tokens of the text are followed by another one.
        wrong.follow([start, start + 1, 200 + draw.randrange(10_000)])
    wrong.follow([40, 41])
    right = lookup_of(TEXT * 3)
    right.follow(TEXT * 6)
    assert wrong.chances(1)[0] < 0.1
    assert right.chances(1)[0] > 0.9


def test_an_index_rests_with_the_entries_of_its_sequence() -> None:
    cache = [KVCache()]
    lookup = lookup_of([*TEXT, 9, *TEXT[:4]])
    lookup.rest_with(cache, len(TEXT) + 3)
    assert held(cache) == [*TEXT, 9, *TEXT[:2]]
    twin = copy.deepcopy(cache)
    one = Lookup.of(cache, len(TEXT) + 3)
    assert "_optiq_index" not in vars(cache[0])
    one.follow([77])
    assert held(twin) == [*TEXT, 9, *TEXT[:2]]
    other = Lookup.of(twin, len(TEXT) + 3, [*TEXT, 9, *TEXT[:2]])
    other.read([TEXT[2]])
    assert other.copy(2) == TEXT[3:5]


def test_an_index_follows_its_entries_where_these_were_trimmed() -> None:
    cache = [KVCache()]
    lookup_of([*TEXT, 9, 10]).rest_with(cache, len(TEXT) + 2)
    lookup = Lookup.of(cache, len(TEXT))
    lookup.rest_with(cache, len(TEXT))
    assert held(cache) == TEXT
    # Somebody decoded on without it: what is missing is not made up.
    lookup = Lookup.of(cache, len(TEXT) + 5)
    lookup.read([1, 2])
    lookup.rest_with(cache, len(TEXT) + 7)
    assert held(cache) == [1, 2]


def test_an_index_of_another_text_is_cut_to_what_both_have_in_common() -> None:
    cache = [KVCache()]
    lookup_of([*TEXT, 9, 10]).rest_with(cache, len(TEXT) + 2)
    lookup = Lookup.of(cache, 6, [*TEXT[:4], 70, 71])
    lookup.rest_with(cache, 6)
    assert held(cache) == [*TEXT[:4], 70, 71]


@pytest.mark.parametrize("family", ["llama", "mamba", "gpt_oss"])
@pytest.mark.parametrize("num_taken", [1, 7, 30])
def test_what_was_rejected_or_not_taken_is_never_indexed(
    family: str, num_taken: int
) -> None:
    model = tiny(family)
    prompt = [1, *TEXT, 4, *TEXT]
    cache = make_prompt_cache(model)
    stats = SpeculationStats()
    steps = spec_generate_step(
        mx.array(prompt),
        model,
        prompt_lookup=True,
        num_draft_tokens=8,
        max_tokens=40,
        prompt_cache=cache,
        stats=stats,
    )
    taken = [next(steps)[0] for _ in range(num_taken)]
    steps.close()
    assert held(cache) == [*prompt, *taken]
    again = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=1)]
    assert taken[:1] == again


def test_the_work_for_a_token_does_not_grow_with_the_text() -> None:
    draw = random.Random(0)
    words = [draw.randrange(2000) for _ in range(400)]
    nums_calls = []
    for num_tokens in (10_000, 110_000):
        lookup = lookup_of([words[draw.randrange(400)] for _ in range(num_tokens)])
        calls = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            lookup.follow([words[draw.randrange(400)] for _ in range(500)])
        finally:
            sys.setprofile(None)
        nums_calls.append(calls)
    assert nums_calls[1] < 1.5 * nums_calls[0]
