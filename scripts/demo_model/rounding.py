"""Layers that train as if they were stored in 4 bits.

The numbers are those of MLX's affine quantisation: in each group of weights, one end of
the range and zero are kept exactly. Gradients pass as if nothing had been rounded.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUP_SIZE = 64
BITS = 4


class Linear(nn.Linear):
    """A linear layer without bias, rounded if it is told to be."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)
        _add_switch(self)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, _rounded(self.weight, self.is_rounded))


class Embedding(nn.Embedding):
    """An embedding that is also the output projection, rounded if it is told to be."""

    def __init__(self, num_tokens: int, size: int) -> None:
        super().__init__(num_tokens, size)
        _add_switch(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, _rounded(self.weight, self.is_rounded))

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits."""
        return functional.linear(hidden, _rounded(self.weight, self.is_rounded))


def switch_rounding(model: nn.Module, *, on: bool) -> None:
    """Tell all layers of a model whether they round."""
    for name, buffer in model.named_buffers():
        if name.endswith("is_rounded"):
            buffer.fill_(on)


def round_to_grid(weight: Tensor) -> Tensor:
    """Return what is left of a matrix after quantising it.

    Args:
        weight (Tensor): [rows, columns], columns in whole groups.
    """
    groups = weight.detach().float().unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    num_steps = 2**BITS - 1
    scale = ((high - low) / num_steps).clamp_min(1e-7)
    is_low_kept = low.abs() > high.abs()
    scale = torch.where(is_low_kept, scale, -scale)
    edge = torch.where(is_low_kept, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / zero, scale)
    bias = torch.where(zero != 0, edge, 0.0)
    index = ((groups - bias) / scale).round().clamp(0, num_steps)
    return (index * scale + bias).flatten(-2)


def _add_switch(module: nn.Module) -> None:
    # A tensor and no Python value, so that switching compiles nothing again.
    module.register_buffer("is_rounded", torch.zeros(()), persistent=False)


def _rounded(weight: Tensor, is_rounded: Tensor) -> Tensor:
    difference = round_to_grid(weight) - weight.detach()
    return weight + is_rounded * difference
