"""Measures whether the rows of a pass depend on how many are computed at once.

Speculation computes several rows where plain decoding computes one. Its greedy output
is that of plain decoding, bit for bit, only if a row comes out the same both ways, and
that depends on the kernels that the backend picks for this device. Each operation that
adds up many numbers is measured apart: linear layers, attention, and the recurrence of
Qwen3.5. Everything else is computed number by number, or row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_update

MAX_ROWS = 9  # A pass has the last token and at most 8 draft tokens.

# Each pair is (inputs, outputs). The CPU's BLAS splits small and large products in
# different ways, so there are both: a projection, a gate with one output for each head,
# and a small model's projection.
LINEAR_SIZES = ((2048, 2048), (2048, 32), (256, 256))
# By head size, the numbers of query heads and of key-value heads. The first are those
# of Qwen3.5-9B, the second those of the full-attention layers of Gemma-4 E4B.
ATTENTION_HEADS = {256: (16, 4), 512: (8, 2)}
# These are numbers of tokens in the cache. Kernels split long contexts into parts.
CONTEXTS = (100, 1500)
# The linear-attention layers of Qwen3.5-9B have 16 key heads and 32 value heads of this
# size.
RECURRENT_SIZES = (16, 32, 128)

# A function of this type computes the first rows at once, as many as it is told.
Rows = Callable[[int], mx.array]
Linear = Callable[[mx.array], mx.array]


def measure_exact_rows() -> dict[str, int]:
    """Measure up to how many rows each part of a model is exact on this device.

    Returns:
        dict[str, int]: The largest exact number of rows, from 1 to ``MAX_ROWS``, by the
        name of the part.
    """
    return {
        "linear layers, float32": _linear(dense_linear, mx.float32),
        "linear layers, bfloat16": _linear(dense_linear, mx.bfloat16),
        "linear layers, 4-bit": _linear(quantized_linear, mx.bfloat16),
        "attention, head size 256": min(_attention(256)),
        "attention, head size 512": min(_attention(512)),
        "recurrence": _recurrence(),
    }


def num_exact_rows(alone: Sequence[mx.array], rows: Rows) -> int:
    """Find the largest number of rows that have the same bits together as alone.

    Args:
        alone (Sequence[mx.array]): Each row computed by itself, ``[batch, 1, ...]``.
        rows (Callable): A function that computes the first rows at once, as many as it
          is told.
    """
    expected = _bits(mx.concatenate(alone, axis=1))
    for num_rows in range(2, len(alone) + 1):
        if not mx.array_equal(_bits(rows(num_rows)), expected[:, :num_rows]):
            return num_rows - 1
    return len(alone)


def dense_linear(weight: mx.array) -> Linear:
    return lambda rows: rows @ weight.T


def quantized_linear(weight: mx.array) -> Linear:
    quantized = mx.quantize(weight, group_size=64, bits=4)
    return lambda rows: mx.quantized_matmul(rows, *quantized, group_size=64, bits=4)


def _linear(make_linear: Callable[[mx.array], Linear], dtype: mx.Dtype) -> int:
    return min(_linear_sizes(make_linear, dtype))


def _linear_sizes(
    make_linear: Callable[[mx.array], Linear], dtype: mx.Dtype
) -> Iterator[int]:
    for num_inputs, num_outputs in LINEAR_SIZES:
        normal = _normal(dtype)
        linear = make_linear(normal((num_outputs, num_inputs), 0.02))
        rows = normal((1, MAX_ROWS, num_inputs))
        alone = [linear(row) for row in mx.split(rows, MAX_ROWS, axis=1)]
        yield num_exact_rows(alone, partial(_first, linear, rows))


def _first(linear: Linear, rows: mx.array, num_rows: int) -> mx.array:
    return linear(rows[:, :num_rows])


def _attention(head_size: int) -> Iterator[int]:
    num_heads, num_kv_heads = ATTENTION_HEADS[head_size]
    for context, dtype in product(CONTEXTS, (mx.float32, mx.bfloat16)):
        normal = _normal(dtype)
        queries = normal((1, num_heads, MAX_ROWS, head_size))
        shape = (1, num_kv_heads, context + MAX_ROWS, head_size)
        attend = partial(_attend, queries, normal(shape), normal(shape), context)
        alone = [attend(row, row + 1) for row in range(MAX_ROWS)]
        yield num_exact_rows(alone, partial(attend, 0))


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    context: int,
    start: int,
    stop: int,
) -> mx.array:
    """Attend with some rows, as in a pass whose cache has all rows before them.

    Returns:
        mx.array: ``[1, num_rows, heads, head_size]``.
    """
    rows = mx.fast.scaled_dot_product_attention(
        queries[:, :, start:stop],
        keys[:, :, : context + stop],
        values[:, :, : context + stop],
        scale=queries.shape[-1] ** -0.5,
        # mlx-lm passes no mask for one row.
        mask="causal" if stop - start > 1 else None,
    )
    return rows.swapaxes(1, 2)


def _recurrence() -> int:
    num_key_heads, num_value_heads, size = RECURRENT_SIZES
    normal = _normal(mx.bfloat16)
    q, k = (_unit(normal((1, MAX_ROWS, num_key_heads, size))) for _ in range(2))
    v = normal((1, MAX_ROWS, num_value_heads, size))
    a, b = (normal((1, MAX_ROWS, num_value_heads)) for _ in range(2))
    gates = {
        "A_log": _normal(mx.float32)((num_value_heads,)),
        "dt_bias": mx.ones(num_value_heads),
    }
    state = mx.zeros((1, num_value_heads, size, size))

    def update(start: int, stop: int, state: mx.array) -> tuple[mx.array, mx.array]:
        rows = (x[:, start:stop] for x in (q, k, v, a, b))
        return gated_delta_update(*rows, **gates, state=state)

    alone, single = [], state
    for row in range(MAX_ROWS):
        out, single = update(row, row + 1, single)
        alone.append(out)
    return num_exact_rows(alone, lambda num_rows: update(0, num_rows, state)[0])


def _unit(x: mx.array) -> mx.array:
    """Scale vectors to length 1, as the model does with queries and keys."""
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def _normal(dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Make a source of random arrays that gives the same ones every time."""
    keys = iter(mx.random.split(mx.random.key(0), 8))

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> mx.array:
        return mx.random.normal(shape, dtype, scale=scale, key=next(keys))

    return normal


def _bits(values: mx.array) -> mx.array:
    return values.view(mx.uint16 if values.itemsize == 2 else mx.uint32)
