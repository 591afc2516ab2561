"""Gated delta layers that keep their states after every row of a pass.

mlx-lm has a kernel for the recurrence on Metal. On CUDA it runs about ten operations a
row and layer, and again for every rejection, and the host queues them more slowly than
the device computes them. There, a pass of a few rows runs one kernel of ours a layer,
which leaves the states after each row: taking rows back is choosing other ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.qwen3_5 import GatedDeltaNet

MAX_ROWS = 9  # of a pass: the last token and the most draft tokens
ROWS_PER_BLOCK = 8  # of the state, in a block of the kernel
LANES = 32

_DTYPES = {mx.float32, mx.bfloat16, mx.float16}


@dataclass(frozen=True)
class RowStates:
    """The states of a gated delta layer before a pass and after each of its rows.

    Args:
        window (mx.array): What the convolution sees,
          ``[num_sequences, num_held + num_rows, channels]``, of which ``num_held`` rows
          are from before the pass.
        states (mx.array): Of the recurrence, in float32,
          ``[num_sequences, 1 + num_rows, heads, value_dim, key_dim]``.
        kept (mx.array): How many rows of the pass each sequence keeps,
          ``[num_sequences]``.
    """

    window: mx.array
    states: mx.array
    kept: mx.array

    @property
    def num_held(self) -> int:
        return self.window.shape[1] - self.states.shape[1] + 1

    @property
    def nbytes(self) -> int:
        return int(self.window.nbytes + self.states.nbytes)

    def keeping(self, kept: mx.array) -> RowStates:
        """The same pass, of which other numbers of rows are kept."""
        return replace(self, kept=kept)

    def after(self, num_rows: int) -> list[mx.array]:
        """What an entry holds after as many rows of every sequence; nothing is copied.

        Args:
            num_rows (int): How many.
        """
        window = self.window[:, num_rows : num_rows + self.num_held]
        return [window, self.states[:, num_rows]]

    def taken(self, one: slice = slice(None), kept: mx.array | None = None) -> Any:
        """What an entry holds after the rows that are kept.

        Args:
            one (slice): Of which sequences.
            kept (mx.array, optional): Rows that each of them keeps. Default: ``kept``.
        """
        kept = self.kept[one] if kept is None else kept
        places = (kept[:, None] + mx.arange(self.num_held))[..., None]
        window = mx.take_along_axis(self.window[one], places, axis=1)
        index = kept[:, None, None, None, None]
        return [window, mx.take_along_axis(self.states[one], index, axis=1)[:, 0]]


# While a pass may be rolled back, what takes the states of each layer.
keeper: ContextVar[Callable[[RowStates], None] | None] = ContextVar(
    "keeper", default=None
)


class RowwiseDeltaNet(GatedDeltaNet):
    """mlx-lm's layer, which keeps the states after every row while that is asked for.

    Passes that the kernel does not know stay with mlx-lm.
    """

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any = None
    ) -> mx.array:
        keep = keeper.get()
        if keep is None or not _is_known(self, inputs, mask, cache):
            return super().__call__(inputs, mask, cache)
        before = _states_before(self, cache, inputs)
        mixed, gate_a, gate_b = (
            project(inputs)
            for project in (self.in_proj_qkv, self.in_proj_a, self.in_proj_b)
        )
        if not _has_known_types(self, before, [mixed, gate_a, gate_b]):
            return super().__call__(inputs, mask, cache)
        outputs, after = mix_rows(self, mixed, gate_a, gate_b, before)
        keep(after)
        cache.cache = after.after(inputs.shape[1])
        cache.advance(inputs.shape[1])
        gate = self.in_proj_z(inputs).reshape(outputs.shape)
        return self.out_proj(self.norm(outputs, gate).flatten(-2))


def can_keep_rows() -> bool:
    """Whether the kernel runs on the device in use."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def mix_rows(
    layer: GatedDeltaNet,
    mixed: mx.array,
    gate_a: mx.array,
    gate_b: mx.array,
    before: RowStates,
) -> tuple[mx.array, RowStates]:
    """Convolve, normalise and mix the rows of a pass, in one operation.

    Math: the gated delta rule of ``mlx_lm.models.gated_delta``, with the convolution
    and normalisation before it in ``mlx_lm.models.qwen3_5``.

    Args:
        layer (GatedDeltaNet): Whose weights and sizes to use.
        mixed (mx.array): Queries, keys and values,
          ``[num_sequences, num_rows, channels]``.
        gate_a (mx.array), gate_b (mx.array): Decay and writing strength of each head,
          ``[num_sequences, num_rows, heads]``.
        before (RowStates): The states that the rows start from.

    Returns:
        tuple[mx.array, RowStates]: What ``gated_delta_update`` returns,
        ``[num_sequences, num_rows, heads, value_dim]``, and the states after each row,
        of which all are kept.
    """
    num_sequences, num_rows, num_channels = mixed.shape
    num_heads, value_dim = layer.num_v_heads, layer.head_v_dim
    start = before.states
    num_held = layer.conv_kernel_size - 1
    outputs, states, window = _kernel()(
        inputs=[
            mixed,
            before.window,
            layer.conv1d.weight,
            gate_a,
            gate_b,
            layer.A_log,
            layer.dt_bias,
            start,
            before.kept,
        ],
        template=_template(layer, gate_a),
        grid=(LANES, value_dim, num_sequences * num_heads),
        threadgroup=(LANES, ROWS_PER_BLOCK, 1),
        output_shapes=[
            (num_sequences, num_rows, num_heads, value_dim),
            (num_sequences, 1 + num_rows, *start.shape[2:]),
            (num_sequences, num_held + num_rows, num_channels),
        ],
        output_dtypes=[mixed.dtype, mx.float32, mixed.dtype],
    )
    return outputs, RowStates(window, states, _constant(num_rows, num_sequences))


def _is_known(layer: GatedDeltaNet, inputs: mx.array, mask: Any, cache: Any) -> bool:
    """Whether the kernel can take a pass."""
    is_plain = mask is None and isinstance(cache, ArraysCache)
    return (
        is_plain
        and cache.lengths is None
        and inputs.shape[1] <= MAX_ROWS
        and not layer.training
        and layer.sharding_group is None
        and layer.head_k_dim % LANES == 0
        and layer.head_v_dim % ROWS_PER_BLOCK == 0
        and "bias" not in layer.conv1d
        and can_keep_rows()
    )


def _has_known_types(
    layer: GatedDeltaNet, before: RowStates, rows: list[mx.array]
) -> bool:
    """Whether all that is read with one type has that type."""
    arrays = [*rows, before.window, layer.conv1d.weight]
    dtypes = {array.dtype for array in arrays}
    return len(dtypes) == 1 and dtypes <= _DTYPES and before.states.dtype == mx.float32


def _states_before(
    layer: GatedDeltaNet, cache: ArraysCache, inputs: mx.array
) -> RowStates:
    if (held := getattr(cache, "held", None)) is not None:
        return held
    num_sequences, (window, state) = inputs.shape[0], cache.cache
    if window is None:
        shape = num_sequences, layer.conv_kernel_size - 1, layer.conv_dim
        window = mx.zeros(shape, inputs.dtype)
    if state is None:
        sizes = layer.num_v_heads, layer.head_v_dim, layer.head_k_dim
        state = mx.zeros((num_sequences, *sizes), mx.float32)
    return RowStates(window, state[:, None], _constant(0, num_sequences))


@cache
def _constant(number: int, num_sequences: int) -> mx.array:
    return mx.array([number] * num_sequences, mx.int32)


@cache
def _kernel() -> Any:
    source = resources.files(__package__).joinpath("gated_delta.cu").read_text("utf-8")
    # MLX keeps compiled kernels on disk by their name.
    version = hashlib.sha256(source.encode()).hexdigest()[:8]
    return mx.fast.cuda_kernel(
        name=f"optiq_gated_delta_{version}",
        input_names=[
            "mixed",
            "window",
            "filter",
            "gate_a",
            "gate_b",
            "decay_log",
            "gate_bias",
            "start",
            "kept",
        ],
        output_names=["outputs", "states", "seen"],
        source=source,
    )


def _template(layer: GatedDeltaNet, gate: mx.array) -> list[tuple[str, Any]]:
    """The types and sizes that a kernel is compiled for, which its name consists of."""
    bias = layer.dt_bias.dtype
    return [
        ("InT", gate.dtype),
        ("SumT", mx.result_type(gate, layer.dt_bias)),
        ("LogT", layer.A_log.dtype),
        ("BiasT", bias),
        ("Hk", layer.num_k_heads),
        ("Hv", layer.num_v_heads),
        ("Dk", layer.head_k_dim),
        ("Dv", layer.head_v_dim),
        ("K", layer.conv_kernel_size),
        ("MaxT", MAX_ROWS),
    ]


def keep_rows_in(layer: nn.Module) -> None:
    """Let a gated delta layer keep its states, where the kernel runs; see above."""
    if type(layer) is GatedDeltaNet and can_keep_rows():
        layer.__class__ = RowwiseDeltaNet
