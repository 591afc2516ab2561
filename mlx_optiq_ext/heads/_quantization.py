"""Quantises the layers of a head as the stored tensors are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import infer_quant_config

from ._config import block
from ._locate import StoredHead, Tensors

_BLOCK = "mtplx_mtp_quantization"
# Each policy quantises the layers whose names have this prefix.
_POLICIES = {"cyankiwi": "layers.", "all": ""}

Predicate = Callable[[str, nn.Module], dict[str, Any] | bool]


def match_quantization(stored: StoredHead, head: nn.Module, weights: Tensors) -> None:
    """Quantise, in place, the layers that are stored quantised.

    Bits, group size and mode follow from names, shapes and types of the tensors. Blocks
    in ``config.json`` say the same when they are right, and converters differ on where
    they put them.

    Raises:
        SpeculationError: If a layer is quantised in a way that MLX does not know.
    """

    def stored_params(path: str, module: nn.Module) -> dict[str, Any] | bool:
        is_quantized = f"{path}.scales" in weights and hasattr(module, "to_quantized")
        return is_quantized and _params(path, module, weights)

    _quantize(stored, head, stored_params)


def _params(path: str, module: nn.Module, weights: Tensors) -> dict[str, Any]:
    params = infer_quant_config(path, module, weights)
    num_inputs = module.weight.shape[-1]
    packed, scales = (weights[f"{path}.{name}"].shape for name in ("weight", "scales"))
    # MLX would end the process on some sizes that do not add up.
    if (packed[-1] * 32, scales[-1] * params["group_size"]) != (
        num_inputs * params["bits"],
        num_inputs,
    ):
        raise ValueError(
            f"{path} takes {num_inputs} inputs, its weight is packed to {list(packed)} "
            f"and its scales are {list(scales)}."
        )
    return params


def quantize_as_declared(stored: StoredHead, head: nn.Module) -> None:
    """Quantise, in place, a head that is stored in full but is to run quantised.

    ``mtplx_mtp_quantization`` asks for that with ``"prequantized": false``.

    Raises:
        SpeculationError: If that block asks for something that is not known.
    """
    declared = block(stored.config, _BLOCK)
    if declared.get("prequantized") is not False:
        return
    prefix = _declared_prefix(stored, declared)
    params: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    for name in params.keys() & declared.keys():
        params[name] = _declared_value(stored, name, declared[name], type(params[name]))

    def declared_params(path: str, module: nn.Module) -> dict[str, Any] | bool:
        return (
            path.startswith(prefix)
            and hasattr(module, "to_quantized")
            and module.weight.shape[-1] % params["group_size"] == 0
            and params
        )

    _quantize(stored, head, declared_params)


def _declared_value(
    stored: StoredHead, name: str, value: Any, expected: type
) -> int | str:
    is_number = type(value) is int and value > 0
    if not (is_number if expected is int else isinstance(value, str)):
        kind = "a positive whole number" if expected is int else "a name"
        raise stored.error(
            f"{_BLOCK} in config.json has {value!r} as {name}, expected {kind}."
        )
    return value


def _declared_prefix(stored: StoredHead, declared: dict[str, Any]) -> str:
    policy = declared.get("policy", "cyankiwi")
    if not isinstance(policy, str) or policy not in _POLICIES:
        raise stored.error(
            f"{_BLOCK} in config.json has the policy {policy!r}, expected"
            f" one of {', '.join(_POLICIES)}."
        )
    return _POLICIES[policy]


def _quantize(stored: StoredHead, head: nn.Module, predicate: Predicate) -> None:
    try:
        nn.quantize(head, class_predicate=predicate)
    except (ValueError, RuntimeError, ZeroDivisionError) as exc:
        raise stored.error(f"its quantisation is not understood: {exc}") from exc
