"""Tiny random models of many of mlx-lm's families, with all kinds of cache entries."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCAB_SIZE = 96
WINDOW = 12

ATTENTION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
STATE_SPACE: dict[str, Any] = {
    "state_size": 8,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "n_groups": 1,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": (0.001, 100.0),
}

# What each family needs beyond the names above, by its model type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "ministral3": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "phi3": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "gemma2": {},
    "gemma3_text": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "cohere2": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "llama4": {
        "text_config": ATTENTION
        | {
            "model_type": "llama4_text",
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 4,
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": True,
            "rope_scaling": None,
        }
    },
    "deepseek_v3": LATENT | {"num_key_value_heads": 4},
    "glm4_moe_lite": LATENT | {"num_key_value_heads": 4, "partial_rotary_factor": 1.0},
    "mistral4": LATENT
    | {
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "longcat_flash": LATENT
    | {
        "attention_method": "MLA",
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "routed_scaling_factor": 1.0,
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "kimi_linear": LATENT
    | {
        "model_max_length": 4096,
        "num_experts": 4,
        "moe_renormalize": True,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 1.0,
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
    },
    "deepseek_v32": LATENT
    | {
        "num_key_value_heads": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 8,
    },
    "mamba": STATE_SPACE | {"intermediate_size": 64},
    "mamba2": STATE_SPACE | {"num_heads": 8, "intermediate_size": 64},
    "nemotron_h": STATE_SPACE
    | {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "hybrid_override_pattern": ["M", "*", "-", "M"],
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "granitemoehybrid": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "shared_intermediate_size": 48,
    },
    "falcon_h1": {
        "mamba_d_head": 8,
        "mamba_d_ssm": 32,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "recurrent_gemma": {
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 4,
        "embeddings_scale_by_sqrt_dim": True,
        "lru_width": 32,
        "logits_soft_cap": 30.0,
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "plamo2": {"mamba_d_state": 8, "mamba_num_heads": 4, "hidden_size_per_head": 8},
}


def tiny(family: str, **config: Any) -> nn.Module:
    """Make a model of a family, by its model type in mlx-lm."""
    mx.random.seed(3)
    module = import_module(f"mlx_lm.models.{family}")
    values = ATTENTION | FAMILIES[family] | {"model_type": family} | config
    model = module.Model(module.ModelArgs.from_dict(values))
    mx.eval(model.parameters())
    return model
