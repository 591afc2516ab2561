"""Export: first as Hugging Face stores Gemma-4, then quantised."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch
from demo_model.export import convert
from demo_model.rounding import BITS, GROUP_SIZE
from demo_model.text import END_OF_TEXT, END_OF_TURN, TOKENIZER_FILES
from mlx.utils import tree_flatten
from safetensors.torch import save_file

from mlx_optiq_ext.assistants import load_assistant

from . import ASSISTANT_FOLDER
from .model import ASSISTANT, ROTATIONS, TARGET, Shape

_DTYPE = "float32"
_ROPE_TYPES = {"sliding_attention": "default", "full_attention": "proportional"}


def export(training: Path, tokenizer: Path, folder: Path) -> None:
    """Write everything in the model's folder, its assistant's included, but its README.

    Args:
        training (Path): The folder that training wrote to.
        tokenizer (Path): The folder that `demo_model.text.save_tokenizer` wrote to.
        folder (Path): The model's.
    """
    with TemporaryDirectory() as name:
        full, quantized = Path(name) / "full", Path(name) / "quantized"
        full_assistant = Path(name) / "assistant"
        _copy_tokenizer(tokenizer, full)
        _export_weights(training / "target.pt", full, "model.language_model.")
        _write_json(full / "config.json", _target_config())
        _write_json(full / "generation_config.json", _target_generation())
        convert(full, quantized, folder)
        _export_weights(training / "assistant.pt", full_assistant, "")
        _write_json(full_assistant / "config.json", _assistant_config())
        _quantize_assistant(full_assistant, folder / ASSISTANT_FOLDER)


def _quantize_assistant(full: Path, folder: Path) -> None:
    """Quantise an assistant, its two projections excepted."""
    assistant = load_assistant(full)
    params = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}

    def is_quantized(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and not path.endswith("_projection")

    nn.quantize(assistant, **params, class_predicate=is_quantized)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    tensors = dict(tree_flatten(assistant.parameters()))
    mx.save_safetensors(str(weights), tensors, metadata={"format": "mlx"})
    weights.chmod(0o644)
    config = _assistant_config() | {"quantization": params}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _assistant_generation())


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    # The class of the files' own model cuts text in its own way whatever they say; this
    # one does as they say.
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    _write_json(settings, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _export_weights(checkpoint: Path, folder: Path, prefix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint, map_location="cpu")["state"]
    tensors = {prefix + name: x.float().contiguous() for name, x in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _text_config(shape: Shape) -> dict[str, Any]:
    return dataclasses.asdict(shape) | {
        "model_type": "gemma4_text",
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": None,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": shape.vocab_size,
        "rope_parameters": {
            layer_type: {
                "rope_type": _ROPE_TYPES[layer_type],
                "rope_theta": base,
                "partial_rotary_factor": share,
            }
            for layer_type, (base, share) in ROTATIONS.items()
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TEXT,
        "dtype": _DTYPE,
    }


def _target_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": _text_config(TARGET),
        "audio_config": None,
        "vision_config": None,
        # mlx-lm takes the size of the vocabulary from here.
        "vocab_size": TARGET.vocab_size,
        "tie_word_embeddings": True,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "dtype": _DTYPE,
    }


def _assistant_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": TARGET.hidden_size,
        "text_config": _text_config(ASSISTANT) | {"vocab_size_per_layer_input": 0},
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "dtype": _DTYPE,
    }


def _target_generation() -> dict[str, Any]:
    return {
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def _assistant_generation() -> dict[str, Any]:
    return {
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": False,
        "num_assistant_tokens": 1,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
