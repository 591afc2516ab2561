"""The properties of a model that a head is built from, and the head's precision."""

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

# Qwen3.8 has the type of Qwen3.5. The weights of models of the last type are rotated.
MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "prism_hadamard_qwen35")
# These are the group size and bits of each mode, by default, in mlx_lm.convert.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}

# Routers choose the experts and are small, so they stay in full. mlx-lm gives those of
# a model 8 bits; mlx-optiq could not read a head that has layers of other bits too.
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")

Params = dict[str, Any]


@dataclass(frozen=True)
class Host:
    """The properties of a model that its head is built from.

    A host stays valid when the weights of the model are gone.

    Args:
        args (TextModelArgs): The arguments of the model that reads text.
        dtype (mx.Dtype): The type of the model's states.
        quantization (dict, optional): What linear layers of a head for this model are
          quantised with. None if they are kept in full.
    """

    args: TextModelArgs
    dtype: mx.Dtype
    quantization: Params | None

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Find the properties of a model, which is not run.

        Raises:
            SpeculationError: If the model is of a family without such heads.
        """
        check_type(model)
        return cls(
            model.language_model.args, dtype_of_states(model), _head_params(model)
        )


def may_have_head(model: nn.Module) -> bool:
    """Tell whether a model is of a family whose models have an MTP head."""
    return isinstance(model, qwen3_5.Model)


def check_type(model: nn.Module) -> None:
    """Raise SpeculationError unless a model may have an MTP head."""
    if not may_have_head(model):
        name = getattr(model, "model_type", type(model).__name__)
        raise SpeculationError(
            f"Cannot speculate with an MTP head: the model is of type {name}, and only "
            f"{', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]} have a head that is "
            "supported."
        )


def _head_params(model: nn.Module) -> Params | None:
    """Choose how a model's head is quantised: as the last layer with attention is.

    Where the modules of that layer differ, the head is quantised as most of them are,
    since mlx-optiq cannot read a head of several kinds. Rotated weights bear fewer bits
    than those of a head, which gets the default of mlx_lm.convert instead.
    """
    layers = (x for x in reversed(model.language_model.layers) if not x.is_linear)
    params = usual_params(quantization_of(next(layers, nn.Module())))
    if params is None or params["mode"] in MODES:
        return params
    group_size, bits = MODES["affine"]
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def dtype_of_states(model: nn.Module) -> mx.Dtype:
    """Find the type of a model's states, which quantised weights do not tell.

    The states are built and never evaluated.
    """
    return model.language_model.model(mx.zeros((1, 1), mx.int32)).dtype


def quantization_of(module: nn.Module) -> dict[str, Params]:
    """List how the quantised modules in a module are quantised.

    Args:
        module (nn.Module): A model or a head.

    Returns:
        dict: Group size, bits and mode by the path of a module. Where a module is not
        one of MLX's, its mode is the name of its class.
    """
    return {
        path: {
            "group_size": x.group_size,
            "bits": x.bits,
            "mode": getattr(x, "mode", type(x).__name__),
        }
        for path, x in module.named_modules()
        if hasattr(x, "bits")
    }


def usual_params(by_path: dict[str, Params]) -> Params | None:
    """Find what most of these modules are quantised with, None if there are none."""
    counts = Counter(tuple(params.items()) for params in by_path.values())
    return dict(counts.most_common(1)[0][0]) if counts else None


def quantization_params(
    head: MTPHead, bits: int | None, group_size: int | None, mode: str
) -> Params:
    """Complete the parameters that a head is to be quantised with.

    Args:
        head (MTPHead): The head, not quantised.
        bits (int, optional): The bits of each weight. Default: those of the mode.
        group_size (int, optional): The number of weights that share a scale. Default:
          that of the mode.
        mode (str): The mode, one of ``MODES``.

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

    ``fc``, norms and routers stay in full, and so do layers whose inputs the groups do
    not divide.

    Args:
        head (MTPHead): The head.
        params (dict, optional): The group size, bits and mode. None leaves the head as
          it is.

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
    """Expand, in place, the quantised layers of a head to a type of full precision."""
    dequantize_model(head)
    head.set_dtype(dtype)
    return head
