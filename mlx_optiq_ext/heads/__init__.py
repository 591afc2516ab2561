"""Finds, loads and writes the MTP heads of models.

Qwen3.5, Qwen3.6 and Qwen3.8 models have such a head, and Ternary-Bonsai-2-27B, whose
weights are rotated, takes the one of Qwen3.8-27B. The first of these places that holds
a head is read:

====================================================  ================================
place                                                 written by
====================================================  ================================
``mlx_lm_extra_tensors.mtp_file`` of ``config.json``  mlx-optiq, MTPLX
``optiq/mtp.safetensors``                             mlx-optiq, this package
``mtp.safetensors``, ``mtp/weights.safetensors``,     sidecars beside a converted model
``model-mtp.safetensors``
``mtp.*``, ``language_model.mtp.*`` in the shards     Qwen; converters that keep it
that the index names, or without an index in
``model*.safetensors``
all of ``*.safetensors``, names with or without       repositories with just a head
prefix
====================================================  ================================

A place that is named may also be a ``.safetensors`` file or a Hub id. A head may be
stored in these ways:

* experts fused (``experts.gate_up_proj``), one by one (``experts.0.up_proj``) or as
  mlx-lm has them (``switch_mlp.up_proj``);
* bfloat16, float16 or float32, any layer quantised in any of MLX's modes: names and
  shapes of the tensors say how, whichever block of ``config.json`` does;
* norms as Qwen stores them, around zero, or as ``nn.RMSNorm`` takes them, around one.
"""

from ._carry import carry_head
from ._describe import describe_head
from ._head import MTPHead
from ._host import (
    MODEL_TYPES,
    Host,
    check_type,
    dequantize_head,
    dtype_of_states,
    may_have_head,
    quantization_of,
    quantization_params,
    quantize_head,
)
from ._hub import in_hub_cache
from ._load import load_head
from ._locate import has_head
from ._write import add_sidecar

__all__ = [
    "MODEL_TYPES",
    "Host",
    "MTPHead",
    "add_sidecar",
    "carry_head",
    "check_type",
    "dequantize_head",
    "describe_head",
    "dtype_of_states",
    "has_head",
    "in_hub_cache",
    "load_head",
    "may_have_head",
    "quantization_of",
    "quantization_params",
    "quantize_head",
]
