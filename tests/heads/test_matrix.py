"""What one tool writes the others read, in every precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import load_model

from mlx_optiq_ext.heads import Host, add_sidecar, load_head, quantize_head
from tests.heads.variants import (
    DENSE,
    MOE,
    Tensors,
    absolute,
    assert_equal,
    checkpoint,
    in_full,
    parameters,
    prefixed,
    write,
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4-bit": {"quantize": True, "q_bits": 4},
    "8-bit": {"quantize": True, "q_bits": 8},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
}
ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with original checkpoints, and conversions that keep the head."""
    place = tmp_path_factory.mktemp("matrix")
    for kind in (DENSE, MOE):
        original = checkpoint(kind, place / kind / "original", mx.bfloat16)
        for precision, options in PRECISIONS.items():
            mlx_lm.convert(str(original), str(place / kind / precision), **options)
    return place


def raw_head(original: Path) -> Tensors:
    tensors = mx.load(str(original / "model.safetensors"))
    return {name[4:]: x for name, x in tensors.items() if name.startswith("mtp.")}


def stacked(head: Tensors) -> Tensors:
    """With the names that mlx-lm has for experts."""
    block = "layers.0.mlp."
    head = dict(head)
    if (both := head.pop(f"{block}experts.gate_up_proj", None)) is not None:
        gate, up = mx.split(both, 2, axis=-2)
        down = head.pop(f"{block}experts.down_proj")
        for name, x in (("gate", gate), ("up", up), ("down", down)):
            head[f"{block}switch_mlp.{name}_proj.weight"] = x
    return head


def packed(tensors: Tensors, chooses: Callable[[str], bool], **params: Any) -> Tensors:
    """With the chosen weights quantised."""
    result = {}
    for name, x in tensors.items():
        if not name.endswith(".weight") or x.ndim < 2 or not chooses(name):
            result[name] = x
            continue
        layer = name.removesuffix("weight")
        for suffix, part in zip(
            ("weight", "scales", "biases"), mx.quantize(x, **params), strict=False
        ):
            result[layer + suffix] = part
    return result


def rounded(tensors: Tensors, chooses: Callable[[str], bool], **params: Any) -> Tensors:
    """With the chosen weights as they come out of quantisation."""
    return {
        name: (
            mx.dequantize(*mx.quantize(x, **params), **params)
            if name.endswith(".weight") and x.ndim > 1 and chooses(name)
            else x
        )
        for name, x in tensors.items()
    }


def params_of(model: Path) -> dict[str, Any]:
    block = json.loads((model / "config.json").read_text()).get("quantization") or {}
    return {name: block[name] for name in ("group_size", "bits", "mode") if block}


def is_hosts(name: str) -> bool:
    """Whether this package quantises a tensor of a head."""
    return name.startswith("layers.") and not name.endswith(ROUTERS)


def bare(model: Path, folder: Path) -> Path:
    """A converted model as it was before its head was kept."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("optiq"))
    return folder


# Each writes a head where its tool does, and returns where that is with the numbers
# that are to be read.
Written = tuple[Path, Tensors]


def from_hugging_face(original: Path, model: Path, folder: Path) -> Written:
    return original, absolute(stacked(raw_head(original)))


def from_convert(original: Path, model: Path, folder: Path) -> Written:
    head, params = absolute(stacked(raw_head(original))), params_of(model)
    return model, rounded(head, is_hosts, **params) if params else head


def from_extract(original: Path, model: Path, folder: Path) -> Written:
    _, expected = from_convert(original, model, folder)
    extract(original, bare(model, folder))
    return folder, expected


def from_mlx_optiq(original: Path, model: Path, folder: Path) -> Written:
    """Quantises all but norms and ``fc``, and no fused experts; norms are original."""
    head, params = raw_head(original), params_of(model) | {"mode": "affine"}
    bare(model, folder)
    config = json.loads((model / "config.json").read_text())
    config["mlx_lm_extra_tensors"] = {"mtp_file": "optiq/mtp.safetensors"}
    tensors, expected = head, absolute(stacked(head))
    if len(params) > 1:
        policy = {"policy": "cyankiwi", "prequantized": True}
        config["mtplx_mtp_quantization"] = params | policy
        tensors = packed(head, lambda name: name != "fc.weight", **params)
        expected = rounded(
            expected,
            lambda name: name != "fc.weight" and ".switch_mlp." not in name,
            **params,
        )
    write(folder, config, {"optiq/mtp.safetensors": prefixed(tensors)})
    return folder, expected


def from_mlx_vlm(original: Path, model: Path, folder: Path) -> Written:
    """Writes a folder with only the head, all quantised but norms and the router."""
    head, params = absolute(stacked(raw_head(original))), params_of(model)
    config = json.loads((original / "config.json").read_text())
    config = {"model_type": "qwen3_5_mtp", "text_config": config["text_config"]}
    tensors = head
    if params:
        config["quantization"] = params
        tensors = packed(head, lambda name: not name.endswith(ROUTERS[0]), **params)
        head = rounded(head, lambda name: not name.endswith(ROUTERS[0]), **params)
    write(folder, config, {"model.safetensors": tensors}, {"format": "mlx"})
    return folder, head


def extract(source: Path, model: Path) -> None:
    loaded, _ = load_model(model, lazy=True)
    host = Host.of(loaded)
    head = load_head(source, host.args, host.dtype)
    add_sidecar(model, quantize_head(head, host.quantization))


WRITERS = [from_hugging_face, from_convert, from_extract, from_mlx_optiq, from_mlx_vlm]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [DENSE, MOE])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_head_is_read_and_written_again(
    place: Path, tmp_path: Path, writer: Any, kind: str, precision: str
) -> None:
    original, model = place / kind / "original", place / kind / precision
    source, expected = writer(original, model, tmp_path / "written")
    host = Host.of(load_model(model, lazy=True)[0])
    read = load_head(source, host.args, host.dtype)
    assert_equal(in_full(read), expected)

    # What is not quantised yet gets the model's precision, and nothing else changes.
    if params := params_of(model):
        quantized = {name[:-7] for name in parameters(read) if name.endswith("scales")}
        expected = rounded(
            expected,
            lambda name: is_hosts(name) and name[:-7] not in quantized,
            **params,
        )
    again = bare(model, tmp_path / "again")
    extract(source, again)
    head = load_head(again, host.args, host.dtype)
    assert_equal(in_full(head), expected)
