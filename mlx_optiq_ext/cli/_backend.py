"""The backend, and whether its rows depend on how many are computed at once.

Speculation computes several rows where plain decoding computes one. Its greedy
output is plain decoding's bit for bit only if a row comes out the same both ways,
which depends on the kernels that the backend picks for this device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

# The CPU's BLAS splits small and large products differently, so both are here:
# a projection, a gate with one output per head, and a small model's projection.
SIZES = ((2048, 2048), (2048, 32), (256, 256))  # (inputs, outputs)
MAX_ROWS = 8

Linear = Callable[[mx.array], mx.array]


def backend_name() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_name() -> str:
    return mx.device_info().get("device_name", "unknown device")


def measure_exact_rows() -> dict[str, int]:
    """Up to how many rows each kind of linear layer is exact on this device."""
    return {
        kind: min(_exact_rows_of_sizes(make_linear, dtype))
        for kind, make_linear, dtype in (
            ("float32", dense_linear, mx.float32),
            ("bfloat16", dense_linear, mx.bfloat16),
            ("4-bit", quantized_linear, mx.bfloat16),
        )
    }


def num_exact_rows(linear: Linear, rows: mx.array) -> int:
    """The largest number of rows that all come out as each of them does alone.

    Args:
        linear: A function of rows [1, num_rows, inputs].
        rows: The rows to compute, [1, MAX_ROWS, inputs].
    """
    alone = [linear(row) for row in mx.split(rows, rows.shape[1], axis=1)]
    expected = _bits(mx.concatenate(alone, axis=1))
    for num_rows in range(2, rows.shape[1] + 1):
        found = _bits(linear(rows[:, :num_rows]))
        if not mx.array_equal(found, expected[:, :num_rows]):
            return num_rows - 1
    return rows.shape[1]


def dense_linear(weight: mx.array) -> Linear:
    return lambda rows: rows @ weight.T


def quantized_linear(weight: mx.array) -> Linear:
    quantized = mx.quantize(weight, group_size=64, bits=4)
    return lambda rows: mx.quantized_matmul(rows, *quantized, group_size=64, bits=4)


def _exact_rows_of_sizes(
    make_linear: Callable[[mx.array], Linear], dtype: mx.Dtype
) -> Iterator[int]:
    for num_inputs, num_outputs in SIZES:
        weight_key, rows_key = mx.random.split(mx.random.key(0))
        normal = partial(mx.random.normal, dtype=dtype)
        weight = normal((num_outputs, num_inputs), scale=0.02, key=weight_key)
        rows = normal((1, MAX_ROWS, num_inputs), key=rows_key)
        yield num_exact_rows(make_linear(weight), rows)


def _bits(values: mx.array) -> mx.array:
    return values.view(mx.uint16 if values.itemsize == 2 else mx.uint32)
