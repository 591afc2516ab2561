"""What a server keeps of the prompts that it has processed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from mlx_optiq_ext.serving._prompt_cache import Key, PromptCache, common_length

STATE_BYTES = 4
MEMORY = "max_recommended_working_set_size"


def rows(tokens: list[int]) -> KVCache:
    """An entry whose rows tell of which tokens they are."""
    entry = KVCache()
    keys = mx.array(tokens, mx.float32)[None, None, :, None]
    entry.state = keys, 2 * keys, len(tokens)
    mx.eval(entry.keys, entry.values)
    return entry


def hybrid(tokens: list[int]) -> list[Any]:
    """Entries of a model with rows and with a state that cannot be taken back."""
    state = ArraysCache(1)
    state[0] = mx.array([sum(tokens)], mx.int32)
    mx.eval(state[0])
    return [rows(tokens), state]


def attention(tokens: list[int]) -> list[Any]:
    return [rows(tokens)]


def assert_holds(entries: list[Any] | None, tokens: list[int]) -> None:
    assert entries is not None
    keys, values = entries[0].keys_and_values()
    assert keys[0, 0, :, 0].tolist() == tokens
    assert values[0, 0, :, 0].tolist() == [2 * token for token in tokens]
    if len(entries) == 2:
        assert entries[1][0].tolist() == [sum(tokens)]


def keep(
    cache: PromptCache, tokens: list[int], kind: str = "assistant", make: Any = hybrid
) -> None:
    cache.insert_cache("m", tokens, make(tokens), cache_type=kind)


def cached(cache: PromptCache, tokens: list[int]) -> int:
    entries, rest = cache.fetch_nearest_cache("m", tokens)
    num_cached = len(tokens) - len(rest)
    assert tokens[num_cached:] == rest
    if entries is None:
        assert num_cached == 0
    else:
        assert_holds(entries, tokens[:num_cached])
    return num_cached


A = [*range(1000, 1100)]
B = [*range(2000, 2100)]


@pytest.mark.parametrize("make", [hybrid, attention])
def test_the_longest_beginning_is_found(make: Any) -> None:
    cache = PromptCache()
    for end in (10, 40, 70):
        keep(cache, A[:end], make=make)
    assert cached(cache, A) == 70
    assert cached(cache, B) == 0
    # Only rows can be taken back to where two prompts part.
    assert cached(cache, A[:55] + B) == (40 if make is hybrid else 55)
    assert cache.fetch_nearest_cache("other", A) == (None, A)


@pytest.mark.parametrize("make", [hybrid, attention])
def test_a_prompt_that_is_all_cached_leaves_a_token_to_go_on_from(make: Any) -> None:
    cache = PromptCache()
    keep(cache, A[:10], "user", make)
    keep(cache, A[:20], make=make)
    assert cached(cache, A[:20]) == (10 if make is hybrid else 19)
    assert cached(cache, A[:1]) == 0
    assert cached(cache, []) == 0


def test_what_is_handed_out_can_be_written_to() -> None:
    cache = PromptCache()
    keep(cache, A[:10], "user")
    keep(cache, A[:20])
    for tokens in (A[:15], A[:21]):
        entries, _ = cache.fetch_nearest_cache("m", tokens)
        assert entries is not None
        more = mx.full((1, 1, 5, 1), 7.0)
        entries[0].update_and_fetch(more, more)
        entries[1][0] = mx.array([0])
        mx.eval(entries[0].keys, entries[0].values)
    assert cached(cache, A[:15]) == 10
    assert cached(cache, A[:21]) == 20


def test_rows_that_prompts_share_are_held_once() -> None:
    cache = PromptCache()
    keep(cache, A[:40], "user")
    alone = cache.nbytes
    keep(cache, A[:60])
    keep(cache, A[:80])
    keep(cache, A)
    assert len(cache) == 4
    assert alone == 40 * 8 + STATE_BYTES
    assert cache.nbytes == len(A) * 8 + 4 * STATE_BYTES
    for end in (50, 70, 90):
        assert cached(cache, A[:end]) == 40 + (end - 40) // 20 * 20


def test_what_looked_at_rows_holds_them_when_their_owner_goes() -> None:
    cache = PromptCache()
    keep(cache, A[:40], "user")
    keep(cache, A)
    assert cached(cache, A[:50]) == 40  # Now the shorter one is the one used last.
    cache.trim_to(n_sequences=1)
    assert len(cache) == 1
    assert cache.nbytes == 40 * 8 + STATE_BYTES
    assert cached(cache, A) == 40


def test_the_same_prompt_is_kept_once() -> None:
    cache = PromptCache()
    keep(cache, A[:40], "user")
    for _ in range(3):
        keep(cache, A)
    assert len(cache) == 2
    assert cache.nbytes == len(A) * 8 + 2 * STATE_BYTES
    assert cached(cache, [*A, 1]) == len(A)
    assert cached(cache, A) == 40


def test_beginnings_of_what_can_be_shortened_need_no_caches_of_their_own() -> None:
    cache = PromptCache()
    for end in (10, 40, 70):
        keep(cache, A[:end], make=attention)
    assert len(cache) == 1
    assert cached(cache, A[:30]) == 29


def test_many_caches_are_kept_as_long_as_there_is_room() -> None:
    cache = PromptCache()
    for number in range(200):
        keep(cache, [number, *A])
    assert len(cache) == 200
    assert cached(cache, [0, *A, 1]) == 1 + len(A)


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    size = 100 * 8 + STATE_BYTES
    cache = PromptCache(max_bytes=2 * size)
    keep(cache, A)
    keep(cache, B)
    assert cached(cache, [*A, 1]) == len(A)
    keep(cache, [*range(3000, 3100)])
    assert cache.nbytes <= 2 * size
    assert cached(cache, [*A, 1]) == len(A)
    assert cached(cache, [*B, 1]) == 0


def test_what_a_longer_one_took_the_place_of_goes_before_what_is_older() -> None:
    cache = PromptCache(max_size=4)
    keep(cache, B)
    keep(cache, A[:20], "user")
    keep(cache, A[:40])
    keep(cache, A[:60])
    keep(cache, A[:80])
    # Of the ends of replies the last is left, and where the user's message ended.
    assert [cached(cache, A[:n]) for n in (90, 75, 50, 30)] == [80, 60, 20, 20]
    keep(cache, A[:90])
    assert [cached(cache, A[:n]) for n in (95, 85, 75, 50)] == [90, 80, 20, 20]
    assert cached(cache, [*B, 1]) == len(B)
    # The next message of the user takes the place of the one before.
    keep(cache, A[:95], "user")
    assert [cached(cache, A[:n]) for n in (99, 94, 30)] == [95, 90, 0]
    assert cached(cache, [*B, 1]) == len(B)


def test_who_uses_a_cache_uses_its_beginnings() -> None:
    cache = PromptCache(max_size=3)
    keep(cache, A[:20], "user")
    keep(cache, A[:40])
    keep(cache, B)
    assert cached(cache, A[:50]) == 40
    keep(cache, [1, 2, 3])
    assert cached(cache, A[:30]) == 20
    assert cached(cache, [*B, 1]) == 0


def test_models_that_are_not_served_any_more_go_first() -> None:
    cache = PromptCache(max_size=2)
    cache.insert_cache("old", A, hybrid(A))
    keep(cache, A[:50])
    keep(cache, B)
    assert cache.fetch_nearest_cache("old", [*A, 1])[0] is None
    assert cached(cache, A) == 50


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    cache = PromptCache(max_bytes=100)
    keep(cache, A)
    assert len(cache) == cache.nbytes == 0


def test_limits_can_be_asked_for_one_by_one() -> None:
    cache = PromptCache()
    for number in range(10):
        keep(cache, [number, *A])
    cache.trim_to(n_sequences=7)
    assert len(cache) == 7
    cache.trim_to(n_bytes=cache.nbytes - 1)
    assert len(cache) == 6
    cache.trim_to(n_bytes=-1)
    assert len(cache) == 0


def test_the_flags_mean_what_they_say_if_they_are_given() -> None:
    flags = {"prompt_cache_size": 2, "prompt_cache_bytes": None}
    given = PromptCache.of(SimpleNamespace(is_prompt_cache_size_given=True, **flags))
    default = PromptCache.of(SimpleNamespace(is_prompt_cache_size_given=False, **flags))
    for cache, expected in ((given, 2), (default, 5)):
        for number in range(5):
            keep(cache, [number, *A])
        assert len(cache) == expected
    flags = {"prompt_cache_size": 10, "prompt_cache_bytes": 1000}
    small = PromptCache.of(SimpleNamespace(**flags))
    keep(small, A)
    keep(small, B)
    assert len(small) == 1


def test_processes_that_share_a_model_keep_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = SimpleNamespace(prompt_cache_size=3, is_prompt_cache_size_given=False)
    kept = []
    # Memory in bytes: to one process next to nothing is left.
    for size in (1 << 40, 1):
        monkeypatch.setattr(mx, "device_info", lambda size=size: {MEMORY: size})
        cache = PromptCache.of(flags, is_distributed=True)
        for number in range(5):
            keep(cache, [number, *A])
        assert cached(cache, [4, *A]) == 0, "an exact hit leaves no token to go on from"
        kept.append([each.tokens[0] for each in cache._kept])
    assert kept == [[2, 3, 4]] * 2


def test_the_numbers_are_told_by_kind() -> None:
    cache = PromptCache()
    keep(cache, A[:10], "user")
    keep(cache, A)
    keep(cache, B)
    sizes = {"user": (1, STATE_BYTES), "assistant": (2, 2 * (800 + STATE_BYTES))}
    assert cache.stats_by_type() == {
        kind: {"n_sequences": number, "n_bytes": size}
        for kind, (number, size) in sizes.items()
    }


def test_any_order_of_requests_is_served_right() -> None:
    dice = random.Random(0)
    for make in (hybrid, attention):
        cache = PromptCache(max_bytes=6000)
        for _ in range(600):
            stem = dice.choice([A, B, A[:50] + B])
            tokens = stem[: dice.randint(1, len(stem))]
            cached(cache, tokens)
            if dice.random() < 0.5:
                keep(cache, tokens, dice.choice(["system", "user", "assistant"]), make)
            assert cache.nbytes <= 6000
            held = sum(kept.nbytes for kept in cache._kept)
            assert held == cache.nbytes


def test_the_common_length_of_prompts() -> None:
    dice = random.Random(0)
    for _ in range(300):
        num = dice.choice([0, 1, 63, 64, 65, 200, 1000])
        first = [dice.randint(0, 5) for _ in range(num)]
        second = first[: dice.randint(0, num)] + [9] * dice.randint(0, 70)
        expected = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        assert common_length(Key("q", first), Key("q", second)) == expected
