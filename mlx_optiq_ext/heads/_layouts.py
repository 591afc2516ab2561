"""Gives the tensors of a head the names that mlx-lm's own modules have."""

from __future__ import annotations

import re
from collections import defaultdict

import mlx.core as mx

from ._locate import StoredHead, Tensors

# Fused experts of raw checkpoints have no ".weight"; quantised ones have a suffix.
_FUSED = re.compile(r"(.*\.mlp)\.(?:experts|switch_mlp)\.gate_up_proj(\.\w+)?")
_FUSED_DOWN = re.compile(r"(.*\.mlp)\.experts\.down_proj(\.\w+)?")
_NUMBERED = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+_proj\.\w+)")


def rename(stored: StoredHead) -> Tensors:
    """Name the tensors of a head as ``MTPHead`` does, and stack its experts.

    Raises:
        SpeculationError: If experts are stored one by one and do not fit together.
    """
    weights: Tensors = {}
    experts: dict[str, Tensors] = defaultdict(dict)
    for name, array in stored.tensors.items():
        if match := _FUSED.fullmatch(name):
            # The gate is the first half of the rows, packed or not.
            middle = array.shape[-2] // 2
            block, suffix = match[1], match[2] or ".weight"
            weights[f"{block}.switch_mlp.gate_proj{suffix}"] = array[..., :middle, :]
            weights[f"{block}.switch_mlp.up_proj{suffix}"] = array[..., middle:, :]
        elif match := _FUSED_DOWN.fullmatch(name):
            suffix = match[2] or ".weight"
            weights[f"{match[1]}.switch_mlp.down_proj{suffix}"] = array
        elif match := _NUMBERED.fullmatch(name):
            experts[f"{match[1]}.switch_mlp.{match[3]}"][match[2]] = array
        else:
            weights[name] = array
    return weights | {name: _stack(stored, name, experts[name]) for name in experts}


def _stack(stored: StoredHead, name: str, by_number: Tensors) -> mx.array:
    numbers = sorted(by_number, key=int)
    shapes = {array.shape for array in by_number.values()}
    if numbers != [str(i) for i in range(len(numbers))] or len(shapes) > 1:
        raise stored.error(
            f"{name} is stored by expert and needs all of them, in one shape. Found "
            f"{', '.join(numbers)} of shapes {shapes}."
        )
    return mx.stack([by_number[number] for number in numbers])
