from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.qwen3_5 import SparseMoeBlock
from mlx_lm.utils import load_model

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.heads import (
    Host,
    MTPHead,
    add_sidecar,
    load_head,
    quantization_of,
    quantization_params,
    quantize_head,
)
from tests.heads.variants import DENSE, MOE, assert_same, checkpoint
from tests.processes import run

LAYER = "layers.0."


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("originals")
    return {kind: checkpoint(kind, place / kind, mx.bfloat16) for kind in (DENSE, MOE)}


@pytest.fixture
def model(tmp_path: Path, originals: dict[str, Path]) -> Path:
    """A 4-bit model without a head."""
    return convert(originals[DENSE], tmp_path / "model", quantize=True)


def convert(original: Path, folder: Path, **options: Any) -> Path:
    mlx_lm.convert(str(original), str(folder), mtp=False, **options)
    return folder


def host_of(model: Path) -> Host:
    return Host.of(load_model(model, lazy=True)[0])


def head_for(model: Path, original: Path) -> MTPHead:
    host = host_of(model)
    head = load_head(original, host.args, host.dtype)
    return quantize_head(head, host.quantization)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_layer_is_quantised_as_most_of_the_models_last_layer_with_attention(
    tmp_path, originals
):
    def mixed(path: str, module: Any) -> dict[str, Any]:
        bits = 8 if path.endswith(("layers.3.self_attn.v_proj", "down_proj")) else 3
        return {"group_size": 32, "bits": bits}

    folder = convert(
        originals[DENSE], tmp_path / "m", quantize=True, quant_predicate=mixed
    )
    head = head_for(folder, originals[DENSE])
    params = {"group_size": 32, "bits": 3, "mode": "affine"}
    assert quantization_of(head) == {
        f"{LAYER}self_attn.q_proj": params,
        f"{LAYER}self_attn.k_proj": params,
        f"{LAYER}self_attn.v_proj": params,
        f"{LAYER}self_attn.o_proj": params,
        f"{LAYER}mlp.gate_proj": params,
        f"{LAYER}mlp.up_proj": params,
        f"{LAYER}mlp.down_proj": params,
    }


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8"])
def test_experts_are_quantised_and_routers_norms_and_fc_are_not(
    tmp_path, originals, mode
):
    folder = convert(originals[MOE], tmp_path / "m", quantize=True, q_mode=mode)
    head = head_for(folder, originals[MOE])
    block = head.layers[0].mlp
    assert isinstance(block, SparseMoeBlock)
    for module in (block.switch_mlp.up_proj, block.shared_expert.down_proj):
        assert module.mode == mode
    full = [head.fc, head.norm, head.pre_fc_norm_hidden, head.layers[0].input_layernorm]
    for module in (*full, block.gate, block.shared_expert_gate):
        assert module.weight.dtype == mx.bfloat16


def test_a_model_in_full_gets_a_head_in_full(tmp_path, originals):
    folder = convert(originals[DENSE], tmp_path / "model")
    assert quantization_of(head_for(folder, originals[DENSE])) == {}


def test_a_quantisation_has_the_defaults_of_its_mode(originals):
    host = host_of(originals[MOE])
    head = load_head(originals[MOE], host.args, host.dtype)
    for mode, bits, group_size in (("affine", 4, 64), ("mxfp8", 8, 32)):
        found = quantization_params(head, None, None, mode)
        assert found == {"group_size": group_size, "bits": bits, "mode": mode}
    found = quantization_params(head, 2, 32, "affine")
    assert found == {"group_size": 32, "bits": 2, "mode": "affine"}


def test_groups_that_fit_no_layer_are_an_error(originals):
    host = host_of(originals[DENSE])
    head = load_head(originals[DENSE], host.args, host.dtype)
    with pytest.raises(ValueError, match=r"of 256 do not fit .* take 64, 128"):
        quantization_params(head, None, 256, "affine")


def test_the_sidecar_is_marked_named_and_out_of_reach_of_a_glob(model, originals):
    before = {file.name for file in model.glob("*.safetensors")}
    index = (model / "model.safetensors.index.json").read_bytes()
    file = add_sidecar(model, head_for(model, originals[DENSE]))
    assert file == model / "optiq" / "mtp.safetensors"
    tensors, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert all(name.startswith("mtp.") for name in tensors)
    assert {file.name for file in model.glob("*.safetensors")} == before
    assert (model / "model.safetensors.index.json").read_bytes() == index
    # A downloader that puts all files into one folder loses nothing.
    assert file.with_name("config.json").read_bytes() == (
        (model / "config.json").read_bytes()
    )
    assert not list(model.glob(".*"))


def test_the_configuration_says_what_other_tools_look_for(model, originals):
    config = config_of(model)
    del config["text_config"]["mtp_num_hidden_layers"]
    (model / "config.json").write_text(json.dumps(config))
    add_sidecar(model, head_for(model, originals[DENSE]))
    found = config_of(model)
    assert found.pop("mlx_lm_extra_tensors") == {"mtp_file": "optiq/mtp.safetensors"}
    assert found.pop("mtplx_mtp_quantization") == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "policy": "cyankiwi",
        "prequantized": True,
    }
    assert found["text_config"].pop("mtp_num_hidden_layers") == 1
    assert found == config


def only_values(path: str, module: Any) -> bool:
    return path == "v_proj"


def test_layers_that_differ_are_named_in_the_configuration(model, originals):
    host = host_of(model)
    head = load_head(originals[DENSE], host.args, host.dtype)
    params = {"group_size": 64, "bits": 8, "mode": "affine"}
    nn.quantize(head.layers[0].self_attn, 64, 8, class_predicate=only_values)
    quantize_head(head, host.quantization)
    add_sidecar(model, head)
    block = config_of(model)["mtplx_mtp_quantization"]
    assert block["bits"] == 4
    assert block[f"mtp.{LAYER}self_attn.v_proj"] == params
    assert len(block) == 6


@pytest.mark.parametrize(("bits", "has_block"), [(4, False), (8, True)])
def test_experts_quantised_as_the_model_are_not_declared(
    tmp_path, originals, bits, has_block
):
    folder = convert(originals[MOE], tmp_path / "model", quantize=True)
    host = host_of(folder)
    head = load_head(originals[MOE], host.args, host.dtype)
    quantize_head(head, quantization_params(head, bits, None, "affine"))
    add_sidecar(folder, head)
    assert ("mtplx_mtp_quantization" in config_of(folder)) == has_block


def test_a_new_head_replaces_an_old_one(model, originals):
    host = host_of(model)
    for bits in (8, 4):
        head = load_head(originals[DENSE], host.args, host.dtype)
        quantize_head(head, quantization_params(head, bits, None, "affine"))
        add_sidecar(model, head)
    assert_same(load_head(model, host.args, host.dtype), head)
    assert config_of(model)["mtplx_mtp_quantization"]["bits"] == 4


@pytest.mark.parametrize("has_old", [False, True])
def test_a_failure_leaves_the_model_as_it_was(model, originals, has_old):
    head = head_for(model, originals[DENSE])
    if has_old:
        add_sidecar(model, head)
        config = config_of(model) | {"another": "key"}
        (model / "config.json").write_text(json.dumps(config))
        (model / "optiq" / "mtp.safetensors").unlink()
    # The head cannot be moved over a folder that has something in it.
    (model / "optiq" / "mtp.safetensors" / "in the way").mkdir(parents=True)
    before = contents(model)
    with pytest.raises(OSError, match=r"mtp\.safetensors"):
        add_sidecar(model, head)
    assert contents(model) == before
    assert not list(model.glob(".*"))


@pytest.mark.parametrize(
    ("size", "name"), [(10, "config.json"), (10_000, "optiq/mtp.safetensors")]
)
def test_a_full_disk_is_named_and_leaves_the_model_as_it_was(
    model, originals, size, name
):
    head = head_for(model, originals[DENSE])
    before = contents(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=f"'{model / name}'"):
            add_sidecar(model, head)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(model) == before
    assert not list(model.glob(".*"))
    assert not (model / "optiq").exists()


KILLED = """
import os, pathlib, signal, sys
from mlx_lm.utils import load_model
from mlx_optiq_ext.heads import Host, add_sidecar, load_head

model, original, num_moves = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
host = Host.of(load_model(model, lazy=True)[0])
head = load_head(original, host.args, host.dtype)
move = pathlib.Path.replace

def move_or_die(source, target):
    global num_moves
    if num_moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    num_moves -= 1
    return move(source, target)

pathlib.Path.replace = move_or_die
add_sidecar(model, head)
"""


def add_and_kill(model: Path, original: Path, num_moves: int) -> int:
    """Add a head in a process that is killed after some files were moved."""
    return run(KILLED, "add", model, original, num_moves).code


def test_a_kill_in_the_middle_leaves_a_model_without_a_head_without(model, originals):
    before = contents(model)
    assert add_and_kill(model, originals[DENSE], num_moves=2) == -signal.SIGKILL
    host = host_of(model)
    with pytest.raises(SpeculationError, match="no MTP head"):
        load_head(model, host.args, host.dtype)
    changed = {name for name, x in contents(model).items() if before.get(name) != x}
    left_over = {name for name in changed if name.startswith(".mtp-")}
    assert changed - left_over <= {"config.json", "optiq/config.json"}

    head = head_for(model, originals[DENSE])
    add_sidecar(model, head)
    assert_same(load_head(model, host.args, host.dtype), head)
    assert not list(model.glob(".*"))


def test_a_kill_before_the_end_leaves_every_file_as_it_was(model, originals):
    old = head_for(model, originals[DENSE])
    add_sidecar(model, old)
    before = contents(model)
    assert add_and_kill(model, originals[DENSE], num_moves=0) == -signal.SIGKILL
    host = host_of(model)
    assert_same(load_head(model, host.args, host.dtype), old)
    left_over = {name for name in contents(model) if name.startswith(".mtp-")}
    assert {n: x for n, x in contents(model).items() if n not in left_over} == before


@pytest.mark.parametrize("value", ["x", 5, [1]])
def test_what_is_declared_with_a_wrong_type_is_replaced(model, originals, value):
    config = config_of(model) | {"mlx_lm_extra_tensors": value}
    (model / "config.json").write_text(json.dumps(config))
    add_sidecar(model, head_for(model, originals[DENSE]))
    expected = {"mtp_file": "optiq/mtp.safetensors"}
    assert config_of(model)["mlx_lm_extra_tensors"] == expected


def test_the_folder_of_the_head_is_a_place_that_a_head_is_read_from(model, originals):
    head = head_for(model, originals[DENSE])
    add_sidecar(model, head)
    host = host_of(model)
    assert_same(load_head(model / "optiq", host.args, host.dtype), head)
