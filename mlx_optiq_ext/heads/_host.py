"""What of a model its head depends on, and the precision that it gives the head."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5
from mlx_lm.models.qwen3_5 import TextModelArgs
from mlx_lm.utils import dequantize_model

from .._errors import SpeculationError
from ._head import MTPHead

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")
# Group size and bits of each mode, as mlx_lm.convert has them.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}

# They choose the experts and are small, so they stay in full. mlx-lm gives those of a
# model 8 bits, but then mlx-optiq could not read the head: it knows one number of bits.
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")

Params = dict[str, Any]


@dataclass(frozen=True)
class Host:
    """What of a model its head depends on. It outlasts the model's weights.

    Args:
        args (TextModelArgs): The model's own.
        dtype (mx.Dtype): Of its states.
        quantization (dict, optional): How most linear layers of its last layer with
          full attention are quantised.
    """

    args: TextModelArgs
    dtype: mx.Dtype
    quantization: Params | None

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """What the head of a model depends on.

        Raises:
            SpeculationError: If the model is of a family without such heads.
        """
        check_type(model)
        text_model = model.language_model
        layers = (x for x in reversed(text_model.layers) if not x.is_linear)
        # One for all, also if they differ: mlx-optiq cannot read a head of several.
        params = usual_params(quantization_of(next(layers, nn.Module())))
        return cls(text_model.args, dtype_of_states(model), params)


def check_type(model: nn.Module) -> None:
    """Raise SpeculationError unless a model is one that has an MTP head."""
    if not isinstance(model, qwen3_5.Model):
        name = getattr(model, "model_type", type(model).__name__)
        raise SpeculationError(
            f"Cannot speculate with an MTP head: the model is of type {name}, and only "
            f"{' and '.join(MODEL_TYPES)} have a head that is supported."
        )


def dtype_of_states(model: nn.Module) -> mx.Dtype:
    """The type of a model's states; a quantised one's weights do not tell."""
    states = model.language_model.model(mx.zeros((1, 1), mx.int32))
    return states.dtype  # Without evaluating them.


def quantization_of(module: nn.Module) -> dict[str, Params]:
    """How the quantised modules in a module are, by their path."""
    return {
        path: {"group_size": x.group_size, "bits": x.bits, "mode": x.mode}
        for path, x in module.named_modules()
        if hasattr(x, "bits")
    }


def usual_params(by_path: dict[str, Params]) -> Params | None:
    """What most modules are quantised with, None if none is."""
    counts = Counter(tuple(params.items()) for params in by_path.values())
    return dict(counts.most_common(1)[0][0]) if counts else None


def quantization_params(
    head: MTPHead, bits: int | None, group_size: int | None, mode: str
) -> Params:
    """What to quantise a head with, as asked for and by default.

    Args:
        head (MTPHead): The head, not quantised.
        bits, group_size (int, optional): Default: those of the mode.
        mode (str): One of ``MODES``.

    Raises:
        ValueError: If no layer can be divided into such groups.
    """
    default_group_size, default_bits = MODES[mode]
    params = {
        "group_size": group_size or default_group_size,
        "bits": bits or default_bits,
        "mode": mode,
    }
    sizes = {
        module.weight.shape[-1]
        for _, module in head.layers[0].named_modules()
        if hasattr(module, "to_quantized")
    }
    if all(size % params["group_size"] for size in sizes):
        raise ValueError(
            f"Groups of {params['group_size']} do not fit the head, whose layers take "
            f"{', '.join(map(str, sorted(sizes)))} inputs."
        )
    return params


def quantize_head(head: MTPHead, params: Params | None) -> MTPHead:
    """Quantise, in place, the linear layers of a head's layer that are in full.

    ``fc``, norms and routers stay in full, and what the groups do not divide.

    Args:
        head (MTPHead): The head.
        params (dict, optional): With what. Default: leave it in full.

    Raises:
        ValueError: If MLX does not know such a quantisation.
    """

    def params_of(path: str, module: nn.Module) -> Params | bool:
        if params is None or path in _ROUTERS or not hasattr(module, "to_quantized"):
            return False
        return module.weight.shape[-1] % params["group_size"] == 0 and params

    nn.quantize(head.layers[0], class_predicate=params_of)
    return head


def dequantize_head(head: MTPHead, dtype: mx.Dtype) -> MTPHead:
    """Put the quantised layers of a head in full, in place."""
    dequantize_model(head)
    head.set_dtype(dtype)
    return head
