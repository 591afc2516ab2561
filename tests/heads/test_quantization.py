"""A head is quantised as it is stored or as its configuration asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.heads import MTPHead, load_head
from tests.heads.variants import (
    DENSE,
    MOE,
    assert_same,
    by_expert,
    oracle,
    parameters,
    prefixed,
    reference_head,
    text_args,
    write,
)

MODES: list[dict[str, Any]] = [
    {"group_size": 32, "bits": 4, "mode": "affine"},
    {"group_size": 64, "bits": 8, "mode": "affine"},
    {"group_size": 32, "bits": 3, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


def head_of(kind: str, dtype: mx.Dtype = mx.float32) -> MTPHead:
    """The reference head, or one of more experts whose sizes can be quantised."""
    if kind == DENSE:
        return reference_head(DENSE, dtype)
    mx.random.seed(0)
    args = text_args(
        MOE, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64
    )
    head = MTPHead(args)
    for norm in (head.layers[0].self_attn.q_norm, head.pre_fc_norm_hidden):
        norm.weight = norm.weight + 0.1 * mx.random.normal(norm.weight.shape)
    head.set_dtype(dtype)
    return head


def quantize(head: MTPHead, prefix: str = "", **params: Any) -> MTPHead:
    def fits(path: str, module: nn.Module) -> bool:
        return (
            path.startswith(prefix)
            and hasattr(module, "to_quantized")
            and module.weight.shape[-1] % params["group_size"] == 0
        )

    nn.quantize(head, class_predicate=fits, **params)
    return head


def sidecar(tmp_path: Path, kind: str, tensors: dict[str, mx.array], **blocks: Any):
    config, *_ = oracle(kind)
    files = {"mtp.safetensors": prefixed(tensors)}
    return write(tmp_path, config | blocks, files, {"format": "mlx"})


def load(folder: Path, kind: str, dtype: mx.Dtype = mx.float32) -> MTPHead:
    return load_head(folder, text_args(kind), dtype)


@pytest.mark.parametrize("kind", [DENSE, MOE])
@pytest.mark.parametrize("policy", ["cyankiwi", "all"])
@pytest.mark.parametrize("params", MODES, ids=lambda p: f"{p['mode']}-{p['bits']}")
def test_quantised_layers_are_what_quantising_the_head_gives(
    tmp_path, kind, policy, params
):
    expected = quantize(
        head_of(kind), "layers." if policy == "cyankiwi" else "", **params
    )
    block = params | {"policy": policy, "prequantized": True}
    folder = sidecar(tmp_path, kind, parameters(expected), mtplx_mtp_quantization=block)
    found = load(folder, kind)
    assert_same(found, expected)
    assert isinstance(found.fc, nn.QuantizedLinear) == (policy == "all")
    x = mx.random.normal((1, 3, 64))
    assert mx.array_equal(found(x, x), expected(x, x))


@pytest.mark.parametrize("prefix", ["mtp.", "language_model.mtp.", ""])
def test_overrides_by_layer_in_the_models_own_block_are_kept(tmp_path, prefix):
    router = {"group_size": 64, "bits": 8}
    expected = quantize(head_of(MOE), "layers.0.mlp.gate", **router)
    quantize(expected, "layers.", group_size=32, bits=4)
    quantization = {
        "group_size": 64,  # Of the trunk, and wrong for every layer of the head.
        "bits": 2,
        f"{prefix}layers.0.mlp.gate": router,
        f"{prefix}fc": False,
    }
    folder = sidecar(tmp_path, MOE, parameters(expected), quantization=quantization)
    found = load(folder, MOE)
    assert_same(found, expected)
    assert (found.layers[0].mlp.gate.bits, found.layers[0].mlp.gate.group_size) == (
        8,
        64,
    )


def test_a_plain_head_of_a_quantised_model_stays_plain(tmp_path):
    config, _, head = oracle(DENSE)
    config["quantization"] = {"group_size": 64, "bits": 4}
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    assert_same(load(folder, DENSE), reference_head(DENSE))


@pytest.mark.parametrize("policy", ["cyankiwi", "all"])
def test_a_head_declared_as_not_yet_quantised_is_quantised(tmp_path, policy):
    config, _, head = oracle(DENSE)
    params = {"group_size": 32, "bits": 4, "mode": "affine"}
    block = params | {"policy": policy, "prequantized": False}
    config["mtplx_mtp_quantization"] = block
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    prefix = "layers." if policy == "cyankiwi" else ""
    expected = quantize(reference_head(DENSE), prefix, **params)
    assert_same(load(folder, DENSE), expected)


def test_an_unknown_policy_is_an_error(tmp_path):
    config, _, head = oracle(DENSE)
    config["mtplx_mtp_quantization"] = {"policy": "some", "prequantized": False}
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    with pytest.raises(
        SpeculationError, match=r"^Cannot [^:]*: mtplx_mtp.* 'some', exp"
    ):
        load(folder, DENSE)


def test_quantised_experts_are_read_fused_and_one_by_one(tmp_path):
    expected = quantize(head_of(MOE), "layers.", group_size=32, bits=4)
    tensors = parameters(expected)
    block = "layers.0.mlp.switch_mlp."
    experts = {n: tensors.pop(n) for n in list(tensors) if n.startswith(block)}
    fused, single = {}, {}
    for leaf in ("weight", "scales", "biases"):
        gate, up, down = (
            experts[f"{block}{n}_proj.{leaf}"] for n in ("gate", "up", "down")
        )
        raw = {
            "layers.0.mlp.experts.gate_up_proj": mx.concatenate([gate, up], axis=-2),
            "layers.0.mlp.experts.down_proj": down,
        }
        fused |= {f"{name}.{leaf}": x for name, x in raw.items()}
        single |= {
            name.removesuffix("weight") + leaf: x for name, x in by_expert(raw).items()
        }
    for number, layout in enumerate((fused, single)):
        folder = sidecar(tmp_path / str(number), MOE, tensors | layout)
        assert_same(load(folder, MOE), expected)


def test_experts_in_full_beside_quantised_attention_are_read(tmp_path):
    expected = quantize(
        head_of(MOE), "layers.0.self_attn", group_size=64, bits=4, mode="affine"
    )
    folder = sidecar(tmp_path, MOE, parameters(expected))
    assert_same(load(folder, MOE), expected)


def test_scales_have_the_type_of_the_model(tmp_path):
    stored = quantize(head_of(DENSE, mx.float16), group_size=32, bits=4)
    found = load(sidecar(tmp_path, DENSE, parameters(stored)), DENSE, mx.bfloat16)
    assert found.fc.scales.dtype == found.fc.biases.dtype == mx.bfloat16
    assert found.fc.weight.dtype == mx.uint32
    x = mx.zeros((1, 1, 64), mx.bfloat16)
    assert found(x, x).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "scales",
            lambda x: x.astype(mx.uint8)[:, :2],
            "mode of fc: 4 bits with group",
        ),
        ("scales", lambda x: x[:, :3], "fc takes 128 inputs"),
        ("scales", lambda x: x[:, :0], "division"),
        ("scales", lambda x: mx.repeat(x, 200, axis=1), "fc takes 128 inputs"),
        ("weight", lambda x: x[:, :3], "fc takes 128 inputs"),
        ("weight", lambda x: mx.repeat(x, 3, axis=1), "bits 12"),
        ("scales", lambda x: mx.repeat(x, 2, axis=1), "group size 16"),
        ("biases", lambda x: None, "Missing 1 parameters"),
    ],
)
def test_a_quantisation_that_mlx_does_not_know_is_an_error(
    tmp_path, name, change, reason
):
    tensors = parameters(quantize(head_of(DENSE), group_size=32, bits=4))
    changed = change(tensors.pop(f"fc.{name}"))
    if changed is not None:
        tensors[f"fc.{name}"] = changed
    with pytest.raises(SpeculationError, match=reason):
        load(sidecar(tmp_path, DENSE, tensors), DENSE)


@pytest.mark.parametrize("block", ["4-bit", 4, [4]])
def test_a_block_of_a_wrong_type_is_as_none(tmp_path, block):
    config, _, head = oracle(DENSE)
    config["mtplx_mtp_quantization"] = block
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    assert_same(load(folder, DENSE), reference_head(DENSE))


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "four"},
        {"group_size": "64"},
        {"group_size": 0},
        {"mode": 3},
        {"policy": []},
    ],
)
def test_a_block_with_a_value_of_a_wrong_type_is_an_error(tmp_path, change):
    config, _, head = oracle(DENSE)
    params = {"group_size": 32, "bits": 4, "policy": "all", "prequantized": False}
    config["mtplx_mtp_quantization"] = params | change
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    with pytest.raises(SpeculationError, match=r"mtplx_mtp_quantization|quantisation"):
        load(folder, DENSE)
