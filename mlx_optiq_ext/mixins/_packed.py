"""Projections of the same input in one product, where calls cost more than work.

On CUDA the host queues a product of two or more rows more slowly than the device
computes it. Rows of a product are independent, so projections that read the same input
are one product with their weights below each other. The weights of the layers become
parts of that array: nothing is held twice, and whoever else reads them sees the same
numbers. Only passes of speculation use it; mlx-lm's own decoding does not. Products of
quantised weights are queued faster and take the device longer, so those stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from .._record import record_of

# Names of layers that read the same input.
GROUPS = (
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
)

_is_packing: ContextVar[bool] = ContextVar("is_packing", default=False)


@contextmanager
def packing() -> Iterator[None]:
    """Let the projections that were packed be computed in one product."""
    token = _is_packing.set(True)
    try:
        yield
    finally:
        _is_packing.reset(token)


class Pack:
    """Layers that read the same input, and the product that they have in common.

    The first of them to be called computes what all of them return; the others are
    called with the very same array next.

    Args:
        layers (Sequence[nn.Linear]): Layers whose weights become parts of one array.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self._weight = mx.concatenate([layer.weight for layer in layers])
        sizes = [layer.weight.shape[0] for layer in layers]
        self._ends = list(accumulate(sizes))[:-1]
        self._parts = mx.split(self._weight, self._ends)
        mx.eval(self._parts)
        for layer, part in zip(layers, self._parts, strict=True):
            layer.weight = part
        self._input: mx.array | None = None
        self._outputs: dict[int, mx.array] = {}

    def owns(self, index: int, weight: mx.array) -> bool:
        """Whether a layer still has the weight that it had when it was packed."""
        return weight is self._parts[index]

    def project(self, index: int, x: mx.array) -> mx.array:
        """What one of the layers returns.

        Args:
            index (int): Which.
            x (mx.array): Its input, ``[..., num_inputs]``.
        """
        if self._input is not x or index not in self._outputs:
            parts = mx.split(x @ self._weight.T, self._ends, axis=-1)
            self._input, self._outputs = x, dict(enumerate(parts))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class PackedLinear(nn.Linear):
    """A linear layer that may be computed with others."""

    _pack: tuple[Pack, int]

    def __call__(self, x: mx.array) -> mx.array:
        pack, index = self._pack
        if _is_packing.get() and pack.owns(index, self.weight):
            return pack.project(index, x)
        return super().__call__(x)


def prepare_projections(model: nn.Module) -> None:
    """Pack the projections of a model and of its head, on devices where that pays.

    Args:
        model (nn.Module): The target.
    """
    if not mx.cuda.is_available() or mx.default_device() != mx.gpu:
        return
    record = record_of(model)
    for module in (model, record.head):
        if module is not None and all(module is not each for each in record.packed):
            pack_projections(module)
            record.packed.append(module)


def pack_projections(module: nn.Module) -> None:
    """Pack the projections of a module that read the same input.

    Args:
        module (nn.Module): A model or a head, whose numbers stay as they are.
    """
    for parent in module.modules():
        for names in GROUPS:
            layers = [parent[name] for name in names if name in parent]
            if len(layers) == len(names) and _are_alike(layers):
                _pack(layers)


def _pack(layers: list[nn.Linear]) -> None:
    pack = Pack(layers)
    for index, layer in enumerate(layers):
        # nn.Module.__setattr__ is bypassed, as it makes parameters of what it gets.
        object.__setattr__(layer, "_pack", (pack, index))
        layer.__class__ = PackedLinear


def _are_alike(layers: list[nn.Module]) -> bool:
    """Whether layers can be one product, and are not part of one."""
    if any(type(layer) is not nn.Linear or "bias" in layer for layer in layers):
        return False
    return len({(layer.weight.shape[1], layer.weight.dtype) for layer in layers}) == 1
