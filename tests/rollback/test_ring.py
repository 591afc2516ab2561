"""A ring keeps the order of its slots, and every row of a pass reads them in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma2
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_optiq_ext import SpeculationError
from mlx_optiq_ext.rollback import Transaction, check_entries
from mlx_optiq_ext.rollback._slots import advanced, rows_in_slots
from mlx_optiq_ext.rollback._transaction import _OWN_ATTENTION

NUM_HEADS, NUM_QUERY_HEADS, HEAD_SIZE, NUM_ROWS = 2, 6, 16, 5
RINGS = [(12, 0), (12, 4), (300, 0), (300, 4), (3, 0), (6, 4)]


def rows(start: int, num_rows: int, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Queries, keys and values of positions, the same ones at every call."""
    heads = NUM_QUERY_HEADS + 2 * NUM_HEADS
    both = [
        mx.random.normal((1, heads, 1, HEAD_SIZE), key=mx.random.key(position))
        for position in range(start, start + num_rows)
    ]
    joined = mx.concatenate(both, axis=2).astype(dtype)
    return mx.split(joined, [NUM_QUERY_HEADS, NUM_QUERY_HEADS + NUM_HEADS], axis=1)


class Layer(nn.Module):
    """Attention as mlx-lm's models have it."""

    def __init__(self, dtype: mx.Dtype, window: int | None, has_sinks: bool):
        super().__init__()
        self.dtype = dtype
        self.window = window
        sinks = mx.random.normal((NUM_QUERY_HEADS,), key=mx.random.key(3))
        self.sinks_or_none = sinks.astype(dtype) if has_sinks else None

    def __call__(self, start: int, num_rows: int, cache: Any) -> mx.array:
        hidden = mx.zeros((1, num_rows, 1))
        mask = create_attention_mask(hidden, cache, window_size=self.window)
        assert cache.offset == start
        queries, keys, values = rows(start, num_rows, self.dtype)
        keys, values = cache.update_and_fetch(keys, values)
        return scaled_dot_product_attention(
            queries,
            keys,
            values,
            cache=cache,
            scale=HEAD_SIZE**-0.5,
            mask=mask,
            sinks=self.sinks_or_none,
        )


def prefilled(max_size: int, keep: int, num_tokens: int) -> RotatingKVCache:
    """A ring after the prefill of most of its tokens, the last ones one by one."""
    ring = RotatingKVCache(max_size, keep)
    num_single = num_tokens % 5
    if num_tokens > num_single + 1:
        ring.update_and_fetch(*rows(0, num_tokens - num_single)[1:])
    for position in range(ring.offset, num_tokens):
        ring.update_and_fetch(*rows(position, 1)[1:])
    return ring


def state(ring: RotatingKVCache) -> list[Any]:
    """All that a ring is, but what is behind its offset."""
    if ring.keys is None:
        return [*ring.state]
    held = [x[..., : ring.offset, :].tolist() for x in (ring.keys, ring.values)]
    return [*held, ring.keys.shape, ring.values.shape, *ring.state[2:]]


@pytest.mark.parametrize("num_before", [0, 1, 2, 7, 10, 12, 13, 30, 255, 256, 298, 600])
@pytest.mark.parametrize(("max_size", "keep"), RINGS)
def test_a_pass_leaves_what_single_rows_leave(
    max_size: int, keep: int, num_before: int
) -> None:
    for num_kept in (NUM_ROWS, 3, 1, 0):
        expected, ring = (prefilled(max_size, keep, num_before) for _ in range(2))
        start = state(ring)
        transaction = Transaction([ring])
        transaction.run(
            lambda entries, n: entries[0].update_and_fetch(*rows(num_before, n)[1:]),
            NUM_ROWS,
        )
        transaction.keep(NUM_ROWS)
        transaction.keep(num_kept)
        for position in range(num_before, num_before + num_kept):
            expected.update_and_fetch(*rows(position, 1)[1:])
        assert state(ring) == state(expected)
        transaction.keep(0)
        # Where it grows, a ring that is new has no arrays yet.
        assert state(ring) == start


@pytest.mark.parametrize("num_before", [0, 5, 11, 12, 30])
def test_a_pass_that_is_run_again_begins_where_it_began(num_before: int) -> None:
    ring, offsets = prefilled(12, 0, num_before), []

    def forward(entries: list[Any], num_rows: int) -> None:
        offsets.append(entries[0].offset)
        entries[0].update_and_fetch(*rows(num_before, num_rows)[1:])

    transaction = Transaction([ring])
    transaction.run(forward, NUM_ROWS)
    transaction.keep(0)
    transaction.run(forward, 2)
    assert offsets == [num_before, num_before]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 12, 9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("max_size", "keep"), [(12, 0), (12, 4), (37, 0), (3, 0)])
def test_every_row_attends_as_if_it_came_alone(
    max_size: int, keep: int, dtype: mx.Dtype, window: int | None, has_sinks: bool
) -> None:
    layer = Layer(dtype, window, has_sinks)
    for num_before in (0, 2, 8, 10, 11, 12, 14, 33, 50):
        plain, ring = (prefilled(max_size, keep, num_before) for _ in range(2))
        start = num_before
        for num_kept in (2, 5, 1, 3):
            transaction = Transaction([ring])
            found = transaction.run(
                lambda entries, n, start=start: layer(start, n, entries[0]), NUM_ROWS
            )
            transaction.keep(num_kept)
            for row in range(num_kept):
                expected = layer(start + row, 1, plain)
                assert mx.array_equal(expected, found[:, :, row : row + 1])
            start += num_kept


@pytest.mark.parametrize(("max_size", "keep"), RINGS)
def test_slots_are_taken_in_the_order_of_mlx_lm(max_size: int, keep: int) -> None:
    num_rows = 9
    for num_before in (0, 1, max_size - 1, max_size, 2 * max_size + 1):
        ring = prefilled(max_size, keep, num_before)
        index = min(ring._idx, max_size)
        expected = [-1] * max_size
        for row in range(num_rows):
            slot = advanced(index, row + 1, max_size, keep) - 1
            expected[slot] = row
            found = rows_in_slots(
                mx.arange(max_size), mx.array(index), mx.array(row), max_size, keep
            )
            assert found.tolist() == expected
            ring.update_and_fetch(*rows(num_before + row, 1)[1:])
            assert ring._idx == slot + 1


def test_a_ring_is_written_in_place() -> None:
    ring = prefilled(300, 0, 700)
    for num_rows in (1, 4, 4):
        size = ring.keys.nbytes
        transaction = Transaction([ring])
        seen = transaction.run(
            lambda entries, n: entries[0].update_and_fetch(*rows(700, n)[1:]), num_rows
        )
        # What a pass reads is evaluated before it is known how many rows are kept.
        mx.eval(seen if num_rows == 1 else [seen[0]._keys, seen[0]._values])
        mx.synchronize()
        del seen
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        transaction.keep(2 if num_rows > 1 else 1)
        mx.eval(ring.keys, ring.values)
        assert mx.get_peak_memory() - before < size


def test_a_model_that_reads_its_ring_by_itself_is_refused() -> None:
    args = {"model_type": "gemma2", "hidden_size": 8, "num_hidden_layers": 1}
    args |= {"intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    args |= {"rms_norm_eps": 1e-6, "vocab_size": 8, "num_key_value_heads": 1}
    model = gemma2.Model(gemma2.ModelArgs.from_dict(args))
    check_entries(make_prompt_cache(model), model)
    with pytest.raises(SpeculationError, match="models of type gemma2"):
        check_entries(make_prompt_cache(model, max_kv_size=64), model)


def test_models_that_read_their_entries_by_themselves_are_known() -> None:
    spec = importlib.util.find_spec("mlx_lm.models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = set()
    for path in Path(spec.submodule_search_locations[0]).glob("*.py"):
        source = path.read_text()
        has_entries = "update_and_fetch" in source and path.stem != "cache"
        may_have_rings = "RotatingKVCache" in source or "make_cache" not in source
        is_own = (
            "scaled_dot_product_attention(" not in source or "_softcap_at" in source
        )
        if has_entries and may_have_rings and is_own:
            found.add(path.stem)
    assert found == _OWN_ATTENTION
