"""Compare the CUDA kernel for gated delta layers with mlx-lm's own operations.

Needs an NVIDIA GPU. In float32 outputs and states may differ by a hundred-thousandth of
the largest value. In the short types, in which every operation of mlx-lm's rounds its
result, they may differ by one or two units in the last place of the largest value.

    python scripts/check_recurrence.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
from _benchmarks import markdown_table
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk
from mlx_lm.models.qwen3_5 import GatedDeltaNet, TextModelArgs

from mlx_optiq_ext.rollback import MAX_ROWS, RowStates, can_keep_rows, mix_rows

# Heads of keys and of values in Qwen3.5 of 0.8B, of 4B and 9B, and of 27B.
SHAPES = ((16, 16), (16, 32), (16, 48))
NUM_SEQUENCES = (1, 3)
NUM_ROWS = (1, 2, 5, MAX_ROWS)
FLOAT32_LIMIT = 1e-5
# Differences in a short type that are due to its rounding, of the largest value.
ROUNDING = {mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}


class Rows(NamedTuple):
    """What a layer mixes in a pass."""

    mixed: mx.array
    gate_a: mx.array
    gate_b: mx.array
    before: RowStates

    def of_type(self, dtype: mx.Dtype) -> Rows:
        window = self.before.window.astype(dtype)
        return Rows(
            self.mixed.astype(dtype),
            self.gate_a.astype(dtype),
            self.gate_b.astype(dtype),
            RowStates(window, self.before.states, self.before.kept),
        )


class Result(NamedTuple):
    """How far the kernel is from mlx-lm, as shares of the largest value."""

    name: str
    outputs: float
    states: float
    limit: float

    @property
    def is_right(self) -> bool:
        # A number that is none is not below the limit.
        return self.outputs <= self.limit and self.states <= self.limit


def mix_by_operations(
    layer: GatedDeltaNet,
    mixed: mx.array,
    gate_a: mx.array,
    gate_b: mx.array,
    before: RowStates,
) -> tuple[mx.array, RowStates]:
    """What ``mix_rows`` computes, in the operations that mlx-lm's layer consists of."""
    num_sequences, num_rows, _ = mixed.shape
    held, state = before.taken()
    window = mx.concatenate([held, mixed], axis=1)
    convolved = nn.silu(nn.Conv1d.__call__(layer.conv1d, window))
    parts = mx.split(convolved, [layer.key_dim, 2 * layer.key_dim], axis=-1)
    num_keys, num_values = layer.num_k_heads, layer.num_v_heads
    sizes = (num_keys, -1), (num_keys, -1), (num_values, -1)
    q, k, v = (
        part.reshape(num_sequences, num_rows, *size)
        for part, size in zip(parts, sizes, strict=True)
    )
    q, k = normalize_qk(q, k, inv_scale=layer.head_k_dim**-0.5, eps=1e-6)
    outputs, states = [], [state]
    for row in range(num_rows):
        one = (x[:, row : row + 1] for x in (q, k, v, gate_a, gate_b))
        output, state = gated_delta_update(*one, layer.A_log, layer.dt_bias, state)
        outputs.append(output)
        states.append(state)
    kept = mx.full((num_sequences,), num_rows, mx.int32)
    after = RowStates(window, mx.stack(states, axis=1), kept)
    return mx.concatenate(outputs, axis=1), after


def make_layer(num_key_heads: int, num_value_heads: int) -> GatedDeltaNet:
    args = TextModelArgs(
        hidden_size=128,
        linear_num_key_heads=num_key_heads,
        linear_num_value_heads=num_value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )
    layer = GatedDeltaNet(args)
    layer.dt_bias = mx.random.normal((num_value_heads,))
    return layer.eval()


def make_rows(layer: GatedDeltaNet, num_sequences: int, num_rows: int) -> Rows:
    """Random rows, which start after some of the rows of a pass before them."""
    num_heads, num_before = layer.num_v_heads, 4
    sizes = layer.head_v_dim, layer.head_k_dim
    states = mx.random.normal((num_sequences, 1 + num_before, num_heads, *sizes))
    num_window_rows = layer.conv_kernel_size - 1 + num_before
    window = mx.random.normal((num_sequences, num_window_rows, layer.conv_dim))
    kept = mx.random.randint(0, num_before + 1, (num_sequences,)).astype(mx.int32)
    shape = num_sequences, num_rows
    return Rows(
        mx.random.normal((*shape, layer.conv_dim)),
        mx.random.normal((*shape, num_heads)),
        mx.random.normal((*shape, num_heads)),
        RowStates(window, states, kept),
    )


def compare(layer: GatedDeltaNet, rows: Rows, dtype: mx.Dtype, name: str) -> Result:
    rows = rows.of_type(dtype)
    found, after = mix_rows(layer, *rows)
    expected, expected_after = mix_by_operations(layer, *rows)
    assert mx.array_equal(after.window, expected_after.window), name
    assert mx.array_equal(after.states[:, 0], expected_after.states[:, 0]), name
    outputs = _distance(found, expected)
    states = _distance(after.states, expected_after.states)
    return Result(name, outputs, states, ROUNDING.get(dtype, FLOAT32_LIMIT))


def results() -> Iterator[Result]:
    mx.random.seed(0)
    dtypes = mx.float32, mx.bfloat16, mx.float16
    for heads, dtype in itertools.product(SHAPES, dtypes):
        layer = make_layer(*heads)
        layer.set_dtype(dtype)
        layer.A_log = layer.A_log.astype(mx.float32)
        for num_sequences, num_rows in itertools.product(NUM_SEQUENCES, NUM_ROWS):
            rows = make_rows(layer, num_sequences, num_rows)
            name = f"{heads[0]}/{heads[1]} heads, {dtype}, {num_sequences} x {num_rows}"
            yield compare(layer, rows, dtype, name)


def _distance(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return float((mx.abs(found - expected).max() / mx.abs(expected).max()).item())


@click.command()
def main() -> None:
    """Compare the CUDA kernel for gated delta layers with mlx-lm's own operations."""
    if not can_keep_rows():
        raise click.ClickException("The kernel needs an NVIDIA GPU, and there is none.")
    found = list(results())
    rows = [
        (x.name, f"{x.outputs:.1e}", f"{x.states:.1e}", "yes" if x.is_right else "NO")
        for x in found
    ]
    print(markdown_table(("case", "outputs", "states", "right"), rows))
    sys.exit(not all(result.is_right for result in found))


if __name__ == "__main__":
    main()
