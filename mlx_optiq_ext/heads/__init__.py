"""Where a model's MTP head is stored, and how its tensors become a module.

Of these places the first that holds a head is read:

====================================================  ================================
place                                                 written by
====================================================  ================================
``mlx_lm_extra_tensors.mtp_file`` of ``config.json``  mlx-optiq, MTPLX
``optiq/mtp.safetensors``                             mlx-optiq, this package
``mtp.safetensors``, ``mtp/weights.safetensors``,     sidecars beside a converted model
``model-mtp.safetensors``
``mtp.*``, ``language_model.mtp.*`` in the shards     Qwen; converters that keep it
all of ``*.safetensors``, names without prefix        repositories with just a head
====================================================  ================================

A place that is named may also be a ``.safetensors`` file or a Hub id. In each place:

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
    quantization_of,
    quantization_params,
    quantize_head,
)
from ._load import load_head
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
    "load_head",
    "quantization_of",
    "quantization_params",
    "quantize_head",
]
