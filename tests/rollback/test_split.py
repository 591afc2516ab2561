"""Attention in parts is attention, and its parts are what Metal's kernel takes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import patches
from mlx_optiq_ext.rollback import Transaction, _split, attend_in_parts
from tests.rollback.models import tiny_llama

# Query heads and key heads of Qwen3.5 4B, 27B, 35B-A3B and 122B.
HEADS = [(16, 4), (24, 4), (16, 2), (32, 2)]


def inputs(heads: tuple[int, int], num_rows: int, num_keys: int) -> list[mx.array]:
    num_query_heads, num_key_heads = heads
    shapes = [(1, num_query_heads, num_rows, 64)]
    shapes += [(1, num_key_heads, num_keys, 64)] * 2
    return [mx.random.normal(x, key=mx.random.key(i)) for i, x in enumerate(shapes)]


def masks(num_rows: int, num_keys: int) -> dict[str, Any]:
    rows = mx.arange(num_keys - num_rows, num_keys)[:, None]
    causal = mx.arange(num_keys) <= rows
    return {
        "causal": "causal",
        "none": None,
        "array": causal,
        "of each sequence": causal[None, None],
        "one for all rows": causal[None, None, -1:],
    }


@pytest.mark.parametrize("kind", masks(2, 3))
@pytest.mark.parametrize("heads", HEADS)
def test_parts_are_equal_to_the_whole_to_the_bit(
    heads: tuple[int, int], kind: str
) -> None:
    for num_rows in range(1, 33):
        arrays, mask = inputs(heads, num_rows, 70), masks(num_rows, 70)[kind]
        options = {"cache": None, "scale": 0.125, "mask": mask}
        expected = scaled_dot_product_attention(*arrays, **options)
        found = attend_in_parts(scaled_dot_product_attention, *arrays, **options)
        assert mx.array_equal(expected, found)


@pytest.mark.parametrize("heads", HEADS)
def test_every_part_is_one_that_the_kernel_takes(heads: tuple[int, int]) -> None:
    taken = []

    def attention(queries: mx.array, keys: mx.array, *_: Any, **options: Any) -> Any:
        num_rows = queries.shape[2]
        assert num_rows <= 8
        assert num_rows * heads[0] // heads[1] <= 32
        taken.append((num_rows, keys.shape[2]))
        return queries

    for num_rows in range(1, 33):
        taken.clear()
        arrays = inputs(heads, num_rows, 70)
        attend_in_parts(attention, *arrays, None, 0.125, "causal")
        ends = [sum(rows for rows, _ in taken[: i + 1]) for i in range(len(taken))]
        assert ends[-1] == num_rows
        assert [keys for _, keys in taken] == [70 - num_rows + end for end in ends]


@pytest.mark.skipif(not mx.metal.is_available(), reason="The kernel is one of Metal's.")
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_takes_every_part(heads: tuple[int, int]) -> None:
    def fused(*arrays: mx.array, cache: Any, sinks: Any, **options: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            *arrays, **options, force_fused=True
        )

    for num_rows in range(1, 33):
        arrays = [x.astype(mx.float16) for x in inputs(heads, num_rows, 70)]
        mx.eval(attend_in_parts(fused, *arrays, None, 0.125, "causal"))


def test_wide_heads_attend_at_once() -> None:
    queries, keys = mx.zeros((1, 8, 20, 512)), mx.zeros((1, 2, 40, 512))
    shapes = []

    def attention(queries: mx.array, *_: Any, **options: Any) -> mx.array:
        shapes.append(queries.shape)
        return queries

    attend_in_parts(attention, queries, keys, keys, None, 1.0, "causal")
    assert shapes == [queries.shape]


def test_passes_of_speculation_split_where_the_kernel_is_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches.enable()
    model, seen = tiny_llama(), []
    head_dim = model.layers[0].self_attn.head_dim
    monkeypatch.setattr(_split, "HEAD_DIMS", {head_dim})
    original = mx.fast.scaled_dot_product_attention

    def watched(queries: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append(queries.shape[2])
        return original(queries, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    tokens = mx.arange(3, 15)[None]
    expected = model(tokens, cache=make_prompt_cache(model))
    assert set(seen) == {12}
    for has_kernel, widest in ((False, 12), (True, 8)):
        monkeypatch.setattr(mx.metal, "is_available", lambda has=has_kernel: has)
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        seen.clear()
        transaction = Transaction(make_prompt_cache(model))
        found = transaction.run(lambda entries, n: model(tokens[:, :n], entries), 12)
        monkeypatch.undo()
        monkeypatch.setattr(_split, "HEAD_DIMS", {head_dim})
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
        assert max(seen) == widest
        assert mx.array_equal(expected, found)
