"""Makes tiny random models of other families, with their kinds of cache entries."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3_text, gpt_oss, llama

VOCAB_SIZE = 200
WINDOW = 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tiny_gpt_oss() -> nn.Module:
    """With sinks, a sliding window in every other layer, and experts."""
    mx.random.seed(1)
    args = gpt_oss.ModelArgs(
        **SIZES,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
    )
    model = gpt_oss.Model(args)
    for layer in model.layers:
        layer.self_attn.sinks = mx.random.normal((SIZES["num_attention_heads"],))
    mx.eval(model.parameters())
    return model


def tiny_gemma3() -> nn.Module:
    """With a sliding window in two of three layers."""
    mx.random.seed(1)
    args = gemma3_text.ModelArgs(
        **SIZES,
        model_type="gemma3_text",
        num_hidden_layers=6,
        sliding_window=WINDOW - 1,
        sliding_window_pattern=3,
    )
    model = gemma3_text.Model(args)
    mx.eval(model.parameters())
    return model


def tiny_llama(**config: Any) -> nn.Module:
    """With full attention, unless the configuration says otherwise."""
    mx.random.seed(1)
    args = llama.ModelArgs(
        model_type="llama",
        num_hidden_layers=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **(SIZES | config),
    )
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


def in_bfloat16(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model
