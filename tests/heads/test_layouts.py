"""A head is the same in whichever layout it is stored."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_optiq_ext import _errors
from mlx_optiq_ext.heads import load_head
from tests.heads.variants import (
    DENSE,
    MOE,
    absolute,
    assert_same,
    by_expert,
    convert,
    oracle,
    parameters,
    prefixed,
    reference_head,
    rewrite,
    text_args,
    write,
)

KINDS = [DENSE, MOE]
MLX = {"format": "mlx"}


def load_same(kind: str, source: Path | str) -> None:
    assert_same(load_head(source, text_args(kind), mx.float32), reference_head(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_raw_checkpoint_are_read_wherever_the_head_is(tmp_path, kind):
    config, trunk, head = oracle(kind)
    names = sorted(head)
    shards = {
        "model-00001-of-00003.safetensors": trunk,
        "model-00002-of-00003.safetensors": prefixed({n: head[n] for n in names[:5]}),
        "model-00003-of-00003.safetensors": prefixed({n: head[n] for n in names[5:]}),
    }
    load_same(kind, write(tmp_path / "indexed", config, shards, with_index=True))
    load_same(kind, write(tmp_path / "unindexed", config, shards))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["mtp.", "language_model.mtp.", "model.mtp."])
def test_a_head_kept_in_a_converted_model_is_read(tmp_path, kind, prefix):
    *_, head = oracle(kind)
    folder = convert(kind, tmp_path)
    load_same(kind, rewrite(folder, prefixed(absolute(head), prefix)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "optiq/mtp.safetensors",
        "mtp.safetensors",
        "mtp/weights.safetensors",
        "model-mtp.safetensors",
    ],
)
def test_a_sidecar_is_read_in_either_norm_convention(tmp_path, kind, name):
    *_, head = oracle(kind)
    folder = convert(kind, tmp_path)
    load_same(kind, write(folder, None, {name: prefixed(head)}))
    load_same(kind, write(folder, None, {name: prefixed(absolute(head))}, MLX))
    load_same(kind, write(folder, None, {name: absolute(head)}, MLX))


def test_the_file_named_in_the_configuration_comes_first(tmp_path):
    config, _, head = oracle(DENSE)
    config["mlx_lm_extra_tensors"] = {"mtp_file": "extra/head.safetensors"}
    wrong = {"fc.weight": mx.zeros((1, 1)), **head}
    files = {
        "extra/head.safetensors": prefixed(head),
        "optiq/mtp.safetensors": prefixed(wrong | {"fc.weight": mx.zeros((1, 1))}),
    }
    load_same(DENSE, write(tmp_path, config, files))


def test_a_named_file_that_is_absent_does_not_hide_the_others(tmp_path):
    config, _, head = oracle(DENSE)
    config["mlx_lm_extra_tensors"] = {"mtp_file": "extra/head.safetensors"}
    load_same(DENSE, write(tmp_path, config, {"mtp.safetensors": prefixed(head)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_with_just_a_head_is_read(tmp_path, kind):
    config, _, head = oracle(kind)
    config = {"model_type": "qwen3_5_mtp", "text_config": config["text_config"]}
    names = sorted(absolute(head))
    half = {n: absolute(head)[n] for n in names[:6]}
    rest = {n: absolute(head)[n] for n in names[6:]}
    files = {"model-1.safetensors": half, "model-2.safetensors": rest}
    load_same(kind, write(tmp_path, config, files, MLX))


def test_a_file_is_read_without_a_configuration(tmp_path):
    *_, head = oracle(DENSE)
    folder = write(tmp_path, None, {"any.safetensors": prefixed(head)})
    load_same(DENSE, folder / "any.safetensors")
    load_same(DENSE, str(folder / "any.safetensors"))


@pytest.mark.parametrize("norms", [lambda head: head, absolute])
def test_experts_are_read_one_by_one_and_as_mlx_stacks_them(tmp_path, norms):
    config, _, head = oracle(MOE)
    stacked = parameters(reference_head(MOE))
    stacked = {n: norms(head).get(n, x) for n, x in stacked.items()}
    for number, tensors in enumerate((by_expert(norms(head)), stacked)):
        files = {"mtp.safetensors": prefixed(tensors)}
        load_same(MOE, write(tmp_path / str(number), config, files))


def test_an_expert_that_is_left_out_is_an_error(tmp_path):
    config, _, head = oracle(MOE)
    tensors = by_expert(head)
    del tensors["layers.0.mlp.experts.3.up_proj.weight"]
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(tensors)})
    with pytest.raises(_errors.SpeculationError, match=r"Found 0, 1, 2, 4, 5, 6, 7"):
        load_head(folder, text_args(MOE), mx.float32)


def test_the_sizes_of_the_mlp_are_those_of_the_head(tmp_path):
    config, _, head = oracle(MOE)
    reference = reference_head(MOE)
    files = {"mtp.safetensors": prefixed(head)}
    pruned = text_args(MOE, num_experts=4, moe_intermediate_size=12)
    found = load_head(write(tmp_path, config, files), pruned, mx.float32)
    assert_same(found, reference)
    assert found.layers[0].mlp.num_experts == 8
    assert found.layers[0].mlp.top_k == 2

    x = mx.random.normal((1, 3, 64))
    assert mx.array_equal(found(x, x), reference(x, x))


def test_only_the_tensors_of_the_head_are_read(tmp_path):
    config, trunk, head = oracle(DENSE)
    big = {"model.language_model.embed_tokens.weight": mx.zeros((1 << 24,))}
    folder = write(tmp_path, config, {"model.safetensors": big | prefixed(head)})
    size = sum(x.nbytes for _, x in tree_flatten(reference_head(DENSE).parameters()))
    del big, trunk, head
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    load_head(folder, text_args(DENSE), mx.float32)
    assert size <= mx.get_peak_memory() - before < 8 * size
