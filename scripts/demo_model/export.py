"""Export: first as Hugging Face stores Qwen3.5, then quantised by mlx-lm."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx_lm
import torch
from safetensors.torch import save_file

from .model import Shape
from .rounding import BITS, GROUP_SIZE
from .text import END_OF_TEXT, END_OF_TURN, TOKENIZER_FILES

_DTYPE = "float32"


def export(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write a model folder without its README, quantised as `mlx_lm.convert` does it.

    Args:
        checkpoint (Path): What `train` wrote.
        tokenizer (Path): The folder that `save_tokenizer` wrote to.
        folder (Path): The model's.
    """
    with TemporaryDirectory() as name:
        full, quantized = Path(name) / "full", Path(name) / "quantized"
        write_full(checkpoint, tokenizer, full)
        convert(full, quantized, folder)


def write_full(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write the model in float32, in the layout of the Hugging Face checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    state = torch.load(checkpoint, map_location="cpu")["state"]
    tensors = {
        name.replace("model.", "model.language_model.", 1): value.float().contiguous()
        for name, value in state.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(Shape()))
    _write_json(folder / "generation_config.json", _generation_config())


def convert(full: Path, quantized: Path, folder: Path) -> None:
    """Quantise a model, with its head, and keep its tokenizer's files as they were.

    Args:
        full (Path): The model in float32.
        quantized (Path): A folder that does not exist yet.
        folder (Path): Where the result goes.
    """
    mlx_lm.convert(
        str(full), str(quantized), quantize=True, q_bits=BITS, q_group_size=GROUP_SIZE
    )
    (quantized / "README.md").unlink(missing_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(full / name, quantized / name)
    for path in quantized.rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.copytree(quantized, folder, dirs_exist_ok=True)


def _config(shape: Shape) -> dict[str, Any]:
    text_config = dataclasses.asdict(shape)
    rotary_half = shape.rotary_dim // 2
    third = rotary_half // 3
    interval = shape.full_attention_interval
    text_config |= {
        "model_type": "qwen3_5_text",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "tie_word_embeddings": True,
        "layer_types": [
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(shape.num_hidden_layers)
        ],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text_config.pop("rope_theta"),
            "partial_rotary_factor": text_config.pop("partial_rotary_factor"),
            "mrope_interleaved": True,
            "mrope_section": [rotary_half - 2 * third, third, third],
        },
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TEXT,
        "dtype": _DTYPE,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text_config,
        "tie_word_embeddings": True,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "dtype": _DTYPE,
    }


def _generation_config() -> dict[str, Any]:
    return {
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
