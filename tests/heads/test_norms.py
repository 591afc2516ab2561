"""The convention of a head's norms is told, or said to be unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.heads import load_head
from tests.heads.variants import (
    DENSE,
    absolute,
    assert_same,
    convert,
    oracle,
    prefixed,
    reference_head,
    rewrite,
    text_args,
    write,
)

LAYER_NORMS = [
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.self_attn.q_norm.weight",
    "layers.0.self_attn.k_norm.weight",
]
PRE_FC_NORMS = ["pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"]
NORMS = [*LAYER_NORMS, *PRE_FC_NORMS, "norm.weight"]

# Means as reported for published zero-centred heads, in the order of NORMS.
PUBLISHED = [
    [0.04, 0.21, 0.79, 0.78, -0.46, -0.16, 1.25],
    [0.30, 0.39, 0.75, 0.73, -0.44, -0.10, 2.58],
    [0.00, 0.30, 0.75, 0.75, -0.73, -0.51, 0.85],
]
MLX = {"format": "mlx"}


def load(source: Path) -> Any:
    return load_head(source, text_args(DENSE), mx.float32)


def with_means(means: list[float]) -> dict[str, mx.array]:
    *_, head = oracle(DENSE)
    for name, mean in zip(NORMS, means, strict=True):
        head[name] = head[name] - head[name].mean() + mean
    return head


def sidecar(tmp_path: Path, head: dict[str, mx.array], **kwargs: Any) -> Path:
    config, *_ = oracle(DENSE)
    return write(tmp_path, config, {"mtp.safetensors": prefixed(head)}, **kwargs)


def norm_means(head: Any) -> list[float]:
    attention = head.layers[0].self_attn
    norms = [
        head.layers[0].input_layernorm,
        head.layers[0].post_attention_layernorm,
        attention.q_norm,
        attention.k_norm,
        head.pre_fc_norm_embedding,
        head.pre_fc_norm_hidden,
        head.norm,
    ]
    return [norm.weight.mean().item() for norm in norms]


@pytest.mark.parametrize("means", PUBLISHED)
@pytest.mark.parametrize("shift", [0, 1])
def test_published_means_are_told_apart(tmp_path, means, shift):
    head = load(sidecar(tmp_path, with_means([mean + shift for mean in means])))
    assert norm_means(head) == pytest.approx([mean + 1 for mean in means], abs=1e-5)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("is_absolute", [False, True])
def test_one_norm_of_the_layer_is_enough(tmp_path, number, is_absolute):
    extremes = [(0.39, 0.87), (0.39, 0.87), (0.79, 1.73), (0.79, 1.73)]
    means = [0.6, 0.6, 0.9, 0.9, 0.3, 0.3, 0.9]
    means[number] = extremes[number][is_absolute]
    found = norm_means(load(sidecar(tmp_path, with_means(means))))
    assert found[number] == pytest.approx(means[number] + 1 - is_absolute, abs=1e-5)


def test_small_absolute_norms_before_fc_are_not_shifted_again(tmp_path):
    means = [1.04, 1.21, 1.79, 1.78, 0.2734, 0.4937, 2.25]
    head = load(sidecar(tmp_path, with_means(means)))
    assert norm_means(head) == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("mean", [0.6, 0.9])
def test_what_is_stored_beside_the_head_decides_where_values_do_not(tmp_path, mean):
    config, trunk, _ = oracle(DENSE)
    head = with_means([0.6, 0.6, 0.9, 0.9, 0.3, 0.3, mean])
    files = {"model.safetensors": trunk | prefixed(head)}
    raw = load(write(tmp_path / "raw", config, files))
    marked = load(sidecar(tmp_path / "marked", head, metadata=MLX))
    bare = load(write(tmp_path / "bare", config, {"mtp.safetensors": head}))
    converted = load(rewrite(convert(DENSE, tmp_path / "converted"), prefixed(head)))
    assert norm_means(raw)[0] == pytest.approx(1.6)
    for found in (marked, bare, converted):
        assert norm_means(found)[0] == pytest.approx(0.6)


def test_a_raw_trunk_in_another_shard_decides_too(tmp_path):
    config, trunk, _ = oracle(DENSE)
    head = with_means([0.6, 0.6, 0.9, 0.9, 0.3, 0.3, 0.9])
    files = {"model-1.safetensors": trunk, "model-2.safetensors": prefixed(head)}
    assert norm_means(load(write(tmp_path, config, files)))[0] == pytest.approx(1.6)


def test_a_converted_trunk_in_another_file_does_not_decide(tmp_path):
    *_, head = oracle(DENSE)
    folder = write(
        convert(DENSE, tmp_path), None, {"model-2.safetensors": prefixed(head)}
    )
    assert_same(load(folder), reference_head(DENSE))


def test_norms_that_nothing_tells_the_convention_of_are_an_error(tmp_path):
    head = with_means([0.6, 0.6, 0.9, 0.9, -0.4, -0.4, 0.9])
    with pytest.raises(SpeculationError, match=r"may be zero-centred.* or absolute"):
        load(sidecar(tmp_path, head))


def test_zero_centred_norms_in_a_converted_model_are_a_contradiction(tmp_path):
    *_, head = oracle(DENSE)
    folder = rewrite(convert(DENSE, tmp_path), prefixed(head))
    with pytest.raises(SpeculationError) as error:
        load(folder)
    assert "input_layernorm.weight has a mean of" in str(error.value)
    assert "the trunk stored with it is converted: absolute norms" in str(error.value)


def test_absolute_norms_in_a_raw_checkpoint_are_a_contradiction(tmp_path):
    config, trunk, head = oracle(DENSE)
    files = {"model.safetensors": trunk | prefixed(absolute(head))}
    with pytest.raises(SpeculationError, match="of the original model: zero-centred"):
        load(write(tmp_path, config, files))


def test_zero_centred_norms_without_prefix_are_a_contradiction(tmp_path):
    config, _, head = oracle(DENSE)
    with pytest.raises(SpeculationError, match="names lack the prefix"):
        load(write(tmp_path, config, {"mtp.safetensors": head}))


@pytest.mark.parametrize(
    "shifted",
    [
        LAYER_NORMS,  # What converters do that shift by the names of the trunk's norms.
        LAYER_NORMS[:2],
        [*LAYER_NORMS, "norm.weight"],
        PRE_FC_NORMS,
        ["layers.0.input_layernorm.weight"],
    ],
)
def test_a_head_of_two_conventions_is_an_error(tmp_path, shifted):
    *_, head = oracle(DENSE)
    mixed = head | {name: head[name] + 1 for name in shifted}
    with pytest.raises(SpeculationError, match="of two conventions"):
        load(sidecar(tmp_path, mixed))


def test_a_shifted_last_norm_is_an_error_where_only_the_trunk_tells(tmp_path):
    *_, head = oracle(DENSE)
    mixed = head | {"norm.weight": head["norm.weight"] + 1}
    with pytest.raises(SpeculationError, match="of two conventions"):
        load(rewrite(convert(DENSE, tmp_path), prefixed(mixed)))


def test_the_one_is_added_before_rounding_to_the_type_of_the_model(tmp_path):
    *_, head = oracle(DENSE)
    found = load_head(
        sidecar(tmp_path, head), text_args(DENSE), mx.bfloat16
    ).norm.weight
    expected = (head["norm.weight"] + 1).astype(mx.bfloat16)
    assert mx.array_equal(found, expected)
