"""Writes the models of tests/oracle in the layouts that heads are published in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5 import TextModelArgs
from mlx_lm.utils import load_model, quantize_model, save_model

from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.heads import MTPHead, load_head
from tests.helpers import DEMO

ORACLE = Path(__file__).parent.parent / "oracle"
DENSE = "qwen35_tiny"
MOE = "qwen35_tiny_moe"

PACKED = ("weight", "scales", "biases")

Tensors = dict[str, mx.array]


def oracle(kind: str) -> tuple[dict[str, Any], Tensors, Tensors]:
    """The configuration, trunk and raw, unprefixed head of a model."""
    config = json.loads((ORACLE / kind / "config.json").read_text())
    tensors = mx.load(str(ORACLE / kind / "model.safetensors"))
    head = {name[4:]: x for name, x in tensors.items() if name.startswith("mtp.")}
    trunk = {name: x for name, x in tensors.items() if not name.startswith("mtp.")}
    return config, trunk, head


def text_args(kind: str, **changes: Any) -> TextModelArgs:
    config, *_ = oracle(kind)
    return replace(TextModelArgs.from_dict(config["text_config"]), **changes)


def reference_head(kind: str, dtype: mx.Dtype = mx.float32) -> MTPHead:
    """The head as it is in the original, raw checkpoint."""
    return load_head(ORACLE / kind, text_args(kind), dtype)


def parameters(module: nn.Module) -> Tensors:
    return dict(tree_flatten(module.parameters()))


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Assert that two heads have the same tensors, bit for bit."""
    left, right = parameters(found), parameters(expected)
    assert left.keys() == right.keys()
    for name, x in right.items():
        assert left[name].dtype == x.dtype, name
        assert mx.array_equal(left[name], x), name


def absolute(head: Tensors) -> Tensors:
    return {
        name: x + 1 if name.endswith("norm.weight") or "pre_fc_norm" in name else x
        for name, x in head.items()
    }


def prefixed(head: Tensors, prefix: str = "mtp.") -> Tensors:
    return {prefix + name: x for name, x in head.items()}


def by_expert(head: Tensors) -> Tensors:
    """The experts of a raw head, one by one."""
    block = "layers.0.mlp.experts."
    single = {name: x for name, x in head.items() if block not in name}
    for number, (both, down) in enumerate(
        zip(head[block + "gate_up_proj"], head[block + "down_proj"], strict=True)
    ):
        gate, up = mx.split(both, 2)
        for name, x in (("gate", gate), ("up", up), ("down", down)):
            single[f"{block}{number}.{name}_proj.weight"] = x
    return single


def write(
    folder: Path,
    config: dict[str, Any] | None,
    files: dict[str, Tensors],
    metadata: dict[str, str] | None = None,
    with_index: bool = False,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        mx.save_safetensors(str(file), tensors, metadata or {})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if with_index:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def convert(kind: str, folder: Path, **quantization: Any) -> Path:
    """Do what ``mlx_lm.convert`` does, which leaves the head out."""
    model, config = load_model(ORACLE / kind)
    if quantization:
        model, config = quantize_model(model, config, **quantization)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewrite(folder: Path, extra: Tensors) -> Path:
    """Add tensors to the one file that ``convert`` wrote."""
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    mx.eval(list(tensors.values()))  # They are read from the file written to.
    mx.save_safetensors(str(file), tensors | extra, {"format": "mlx"})
    return folder


def unreadable(folder: Path, shape: tuple[int, ...]) -> mx.array:
    """An array that fails when it is evaluated."""
    file = folder / "unreadable.safetensors"
    mx.save_safetensors(str(file), {"x": mx.zeros(shape)})
    array = mx.load(str(file))["x"]
    file.write_bytes(b"")
    return array


def load(folder: Path) -> nn.Module:
    """Load a model as ``mlx_lm.load`` does once it is patched."""
    model, _ = load_model(folder)
    record_of(model).source = folder
    return model


def checkpoint(kind: str, folder: Path, dtype: mx.Dtype = mx.float32) -> Path:
    """An original checkpoint with sizes that can be quantised, and a tokenizer."""
    config, trunk, head = oracle(kind)
    wider = {96: 128} if kind == DENSE else {24: 64, 48: 128}
    for name in config["text_config"].keys() & {
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    }:
        config["text_config"][name] = wider[config["text_config"][name]]
    mx.random.seed(0)
    tensors = {
        name: (_widened(x, wider) if ".mlp." in name else x).astype(dtype)
        for name, x in (trunk | prefixed(head)).items()
    }
    write(folder, config, {"model.safetensors": tensors}, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def _widened(x: mx.array, sizes: dict[int, int]) -> mx.array:
    shape = [sizes.get(size, size) for size in x.shape]
    return x if shape == [*x.shape] else mx.random.normal(shape, scale=0.05)


def in_full(head: nn.Module) -> Tensors:
    """The tensors of a head, quantised layers put in full."""
    tensors = parameters(head)
    for path, module in head.named_modules():
        if hasattr(module, "bits"):
            packed = [tensors.pop(f"{path}.{name}", None) for name in PACKED]
            tensors[f"{path}.weight"] = mx.dequantize(
                *packed, module.group_size, module.bits, module.mode
            )
    return tensors


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Assert that tensors have the same names and the same numbers, bit for bit."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert mx.array_equal(
            found[name].astype(mx.float32), x.astype(mx.float32)
        ), name
