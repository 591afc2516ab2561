"""A cache of which some rows were taken back is as if it had never had them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_optiq_ext import SpeculationError
from mlx_optiq_ext.rollback import (
    Tape,
    Transaction,
    check_entries,
    has_known_recurrence,
    prepare_recurrence,
)
from tests.helpers import assert_same_cache, contents, load_tiny

NUM_HEADS, HEAD_SIZE = 2, 32

KV_CACHES: dict[str, Callable[[], Any]] = {
    "append": KVCache,
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=4),
    "concatenate": ConcatenateKVCache,
    "chunked": lambda: ChunkedKVCache(64),
    "rotating": lambda: RotatingKVCache(max_size=12),
    "rotating far from full": lambda: RotatingKVCache(max_size=400),
    "rotating with a kept start": lambda: RotatingKVCache(max_size=12, keep=4),
    "nested": lambda: CacheList(KVCache(), RotatingKVCache(max_size=12)),
}


def feed(cache: Any, start: int, num_rows: int) -> None:
    """Append the rows of positions ``start`` and on, the same ones at every call."""
    for inner in cache.caches if isinstance(cache, CacheList) else [cache]:
        rows = [
            mx.random.normal((1, NUM_HEADS, 1, HEAD_SIZE), key=mx.random.key(position))
            for position in range(start, start + num_rows)
        ]
        keys = mx.concatenate(rows, axis=2)
        inner.update_and_fetch(keys, keys + 1)


def fed(make: Callable[[], Any], *num_rows: int) -> Any:
    cache, start = make(), 0
    for num in num_rows:
        feed(cache, start, num)
        start += num
    return cache


def feeding(start: int) -> Callable[[list[Any], int], None]:
    """Append rows to what a transaction hands out in place of its only entry."""
    return lambda entries, num_rows: feed(entries[0], start, num_rows)


@pytest.mark.parametrize("num_kept", [0, 1, 2, 4])
@pytest.mark.parametrize("num_before", [0, 1, 5, 8, 11, 12, 30])
@pytest.mark.parametrize("name", KV_CACHES)
def test_rows_that_are_not_kept_leave_no_trace(
    name: str, num_before: int, num_kept: int
) -> None:
    steps = [1] * num_before
    cache = fed(KV_CACHES[name], *steps)
    transaction = Transaction([cache])
    transaction.run(feeding(num_before), 4)
    transaction.keep(num_kept)
    if num_before + num_kept:
        expected = fed(KV_CACHES[name], *steps, *[1] * num_kept)
        assert_same_cache([expected], [cache])
    # A pass of several rows without a transaction leaves a ring in another order.
    for size in (1, 1, 1) if "rotating" in name or name == "nested" else (1, 3, 1):
        start = num_before + num_kept
        feed(cache, start, size)
        num_before += size
    total = num_before + num_kept
    assert_same_cache([fed(KV_CACHES[name], *[1] * total)], [cache])


@pytest.mark.parametrize("num_before", [5, 12, 30])
@pytest.mark.parametrize("name", KV_CACHES)
def test_one_row_can_be_taken_back(name: str, num_before: int) -> None:
    cache = fed(KV_CACHES[name], *[1] * num_before)
    before = [mx.array(array) for array in contents(cache)]
    transaction = Transaction([cache])
    transaction.run(feeding(num_before), 1)
    transaction.keep(0)
    assert all(map(mx.array_equal, before, contents(cache)))


def test_more_can_be_taken_back_later() -> None:
    for name in ("append", "quantized", "concatenate", "rotating"):
        cache = fed(KV_CACHES[name], *[1] * 20)
        transaction = Transaction([cache])
        transaction.run(feeding(20), 4)
        transaction.keep(3)
        transaction.keep(1)
        assert_same_cache([fed(KV_CACHES[name], *[1] * 21)], [cache])


def test_a_pass_that_fails_half_way_is_taken_back() -> None:
    caches = [fed(KVCache, 5), fed(KVCache, 5)]
    transaction = Transaction(caches)

    def fail(entries: list[Any], num_rows: int) -> None:
        feed(entries[0], 5, num_rows)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        transaction.run(fail, 3)
    transaction.keep(0)
    assert_same_cache([fed(KVCache, 5), fed(KVCache, 5)], caches)


@pytest.mark.parametrize("is_taped", [True, False], ids=["tape", "run again"])
@pytest.mark.parametrize("kind", ["dense", "dense-bf16", "dense-4bit", "moe"])
def test_recurrent_states_are_those_after_the_rows_kept(
    kind: str, is_taped: bool
) -> None:
    model = load_tiny(kind)
    assert has_known_recurrence(model)
    prepare_recurrence(model)
    tokens = mx.arange(1, 14)
    for num_kept in range(6):
        cache, expected = make_prompt_cache(model), make_prompt_cache(model)
        model(tokens[None, :8], cache=cache)
        model(tokens[None, :8], cache=expected)
        transaction = Transaction(cache, Tape() if is_taped else None)
        transaction.run(
            lambda entries, num_rows: model(tokens[None, 8 : 8 + num_rows], entries),
            5,
        )
        transaction.keep(num_kept)
        for position in range(8, 8 + num_kept):
            model(tokens[None, position : position + 1], cache=expected)
        assert_same_cache(expected, cache)


def test_keeping_every_row_computes_nothing() -> None:
    model = load_tiny("dense")
    prepare_recurrence(model)
    cache = make_prompt_cache(model)
    transaction = Transaction(cache, Tape())
    transaction.run(lambda entries, n: model(mx.arange(n)[None], entries), 3)
    before = [entry.state for entry in cache]
    transaction.keep(3)
    for old, entry in zip(before, cache, strict=True):
        if isinstance(entry, ArraysCache):
            assert old[0][0] is entry[0]
            assert old[0][1] is entry[1]


def test_an_entry_of_unknown_type_is_refused() -> None:
    class Unheard:
        pass

    with pytest.raises(SpeculationError, match="Unheard"):
        Transaction([KVCache(), Unheard()])
    with pytest.raises(SpeculationError, match="Unheard"):
        check_entries([CacheList(KVCache(), Unheard())])
