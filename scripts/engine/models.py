"""Models of real shapes with random weights, and drafters for them.

The embedding outweighs what the layers add to it, and the model's head is the embedding
again, so the most probable token is the last one, by far. The cost of a pass does not
depend on that, and no near-tie ends the likeness of two runs where rows depend on how
many are computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text, qwen3_5

from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.assistants import Assistant, AssistantArgs
from mlx_optiq_ext.drafters import Drafter, GemmaAssistantDrafter, MTPDrafter
from mlx_optiq_ext.heads import MTPHead
from mlx_optiq_ext.mixins import MTPMixin, add_mixin

EMBEDDING_SCALE = 16.0
TOP_LOGIT = 15.0
BLOCK_SIZE = 1 << 24  # values made at a time: temporaries of mlx are in float32

QWEN = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
}
GEMMA = {"head_dim": 256, "global_head_dim": 512, "max_position_embeddings": 131072}
GEMMA_ASSISTANT = {
    "hidden_size": 256,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
}


@dataclass(frozen=True)
class Preset:
    """The shape of a model.

    Args:
        family (str): ``"qwen"`` or ``"gemma"``.
        config (dict): What differs from the defaults of mlx-lm's class.
        assistant (dict): The same of the assistant's text configuration.
    """

    family: str
    config: dict[str, Any]
    assistant: dict[str, Any] = field(default_factory=dict)


def _qwen(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    num_value_heads: int,
    vocab_size: int,
    is_tied: bool,
) -> Preset:
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "linear_num_value_heads": num_value_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied,
    }
    return Preset("qwen", QWEN | config)


def _gemma(vocab_size: int, **config: Any) -> Preset:
    config = GEMMA | {"vocab_size_per_layer_input": vocab_size} | config
    assistant = GEMMA_ASSISTANT | {"vocab_size": vocab_size}
    return Preset("gemma", config | {"vocab_size": vocab_size}, assistant)


# The 400M ones have the widths of Qwen3.5-0.8B and about those of Gemma-4 E2B, fewer
# layers and a vocabulary in proportion; the small ones are for a quick look.
PRESETS = {
    "qwen-60m": _qwen(512, 8, 4, 1, 1536, 16, 16384, True),
    "qwen-400m": _qwen(1024, 16, 8, 2, 3584, 16, 49152, True),
    "qwen-4b": _qwen(2560, 32, 16, 4, 9216, 32, 248320, True),
    "qwen-9b": _qwen(4096, 32, 16, 4, 12288, 32, 248320, False),
    "qwen-27b": _qwen(5120, 64, 24, 4, 17408, 48, 248320, False),
    "gemma-40m": _gemma(
        16384,
        hidden_size=512,
        num_hidden_layers=10,
        intermediate_size=1536,
        num_attention_heads=2,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=0,
        use_double_wide_mlp=False,
    ),
    "gemma-400m": _gemma(
        49152,
        hidden_size=1536,
        num_hidden_layers=10,
        intermediate_size=6144,
        num_attention_heads=8,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=0,
        use_double_wide_mlp=False,
    ),
    "gemma-e4b": _gemma(
        262144,
        hidden_size=2560,
        num_hidden_layers=42,
        intermediate_size=10240,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        sliding_window_pattern=6,
        use_double_wide_mlp=False,
    ),
}


@dataclass(frozen=True)
class Weights:
    """How weights are kept.

    Args:
        dtype (mx.Dtype): Of those that are not quantised.
        bits (int, optional): Of the model's linear layers; a drafter's are not
          quantised.
    """

    dtype: mx.Dtype
    bits: int | None = None


def make_model(preset: Preset, weights: Weights) -> nn.Module:
    """A model of mlx-lm's with random weights."""
    make = {"qwen": _make_qwen, "gemma": _make_gemma}[preset.family]
    model = make(preset.config)
    mx.random.seed(0)
    fill(model, weights.dtype)
    if weights.bits is not None:
        nn.quantize(model, group_size=64, bits=weights.bits)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # One by one, so that each frees what it was made of.
    return model.eval()  # As mlx_lm.load leaves it: layers in training use no kernels.


def make_drafter(preset: Preset, model: nn.Module, weights: Weights) -> Drafter:
    """The drafter that such a model brings along, with random weights.

    Args:
        preset (Preset): The shape of the model.
        model (nn.Module): The model.
        weights (Weights): How the drafter keeps its weights.
    """
    if preset.family == "qwen":
        head = MTPHead(model.language_model.args)
        fill(head, weights.dtype)
        record_of(model).head = head
        add_mixin(model, MTPMixin)
        return MTPDrafter(model)
    config = {
        "text_config": preset.assistant,
        "backbone_hidden_size": preset.config["hidden_size"],
        "use_ordered_embeddings": preset.assistant["vocab_size"] == 262144,
    }
    assistant = Assistant(AssistantArgs.from_dict(config))
    fill(assistant, weights.dtype)
    return GemmaAssistantDrafter(assistant).bind(model)


def fill(module: nn.Module, dtype: mx.Dtype) -> None:
    """Give a module random weights, never all of them in another type at once."""
    weights = dict(_random_weights(module, dtype))
    if "language_model.lm_head.weight" in weights:
        table = weights["language_model.model.embed_tokens.weight"]
        weights["language_model.lm_head.weight"] = table
    module.load_weights(list(weights.items()), strict=False)


def _random_weights(
    module: nn.Module, dtype: mx.Dtype
) -> Iterator[tuple[str, mx.array]]:
    for path, array in tree_flatten(module.parameters()):
        if array.dtype == mx.int32:
            yield path, mx.arange(array.size, dtype=mx.int32)
        elif path.endswith("model.norm.weight"):
            size = array.size
            yield path, mx.full(size, TOP_LOGIT / size / EMBEDDING_SCALE, dtype)
        elif array.ndim == 1:
            yield path, mx.ones(array.shape, dtype)
        elif "embed_tokens.weight" in path:
            yield path, _normal(array.shape, EMBEDDING_SCALE, dtype)
        else:
            fan_in = math.prod(array.shape[1:])
            yield path, _normal(array.shape, fan_in**-0.5, dtype)


def _normal(shape: tuple[int, ...], scale: float, dtype: mx.Dtype) -> mx.array:
    num_rows, row_size = shape[0], math.prod(shape[1:])
    step = max(BLOCK_SIZE // row_size, 1)
    blocks = []
    for start in range(0, num_rows, step):
        size = (min(step, num_rows - start), *shape[1:])
        blocks.append(mx.random.normal(size, scale=scale).astype(dtype))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks)


def _make_qwen(config: dict[str, Any]) -> nn.Module:
    args = {"model_type": "qwen3_5", "text_config": config}
    return qwen3_5.Model(qwen3_5.ModelArgs.from_dict(args))


def _make_gemma(config: dict[str, Any]) -> nn.Module:
    return gemma4_text.Model(gemma4_text.ModelArgs.from_dict(config))
