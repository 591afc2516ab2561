"""A head is found where it may be, and a wrong one is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.heads import load_head
from tests.heads.variants import (
    DENSE,
    MOE,
    ORACLE,
    assert_same,
    convert,
    oracle,
    parameters,
    prefixed,
    reference_head,
    text_args,
    write,
)


def load(source: Path | str, kind: str = DENSE, **changes: Any) -> Any:
    return load_head(source, text_args(kind, **changes), mx.float32)


def sidecar(tmp_path: Path, changes: dict[str, Any], kind: str = DENSE) -> Path:
    """A head with tensors changed or, where the change is None, left out."""
    config, _, head = oracle(kind)
    tensors = {name: x for name, x in (head | changes).items() if x is not None}
    return write(tmp_path, config, {"mtp.safetensors": prefixed(tensors)})


def test_a_missing_tensor_is_named(tmp_path):
    folder = sidecar(tmp_path, {"fc.weight": None, "norm.weight": None})
    with pytest.raises(SpeculationError, match=r"Missing: fc\.weight, norm\.weight\. "):
        load(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder = sidecar(tmp_path, {"fc.weight": mx.zeros((64, 64))})
    with pytest.raises(SpeculationError, match=r"\[64, 64\] in place of \[64, 128\]"):
        load(folder)


def test_an_unknown_tensor_is_named(tmp_path):
    folder = sidecar(tmp_path, {"fc.weight_scale_inv": mx.zeros((1, 1))})
    with pytest.raises(SpeculationError, match=r"Not known: fc\.weight_scale_inv\."):
        load(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 128}, {"num_attention_heads": 8}, {"head_dim": 64}]
)
def test_the_head_of_a_model_of_other_sizes_is_an_error(changes):
    with pytest.raises(SpeculationError, match="the head of another model"):
        load(ORACLE / DENSE, **changes)


def test_the_head_of_another_kind_of_model_is_an_error():
    with pytest.raises(
        SpeculationError, match="it is dense and the model is a mixture"
    ):
        load(ORACLE / DENSE, MOE)
    with pytest.raises(SpeculationError, match="mixture of experts and the model is d"):
        load(ORACLE / MOE, DENSE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers.1.input_layernorm.weight": mx.zeros((64,))}, "more than one layer"),
        ({"embed_tokens.weight": mx.zeros((320, 64))}, "embeddings of its own"),
        ({"fc_hidden.weight": mx.zeros((64, 64))}, "fc_embedding and fc_hidden"),
    ],
)
def test_other_kinds_of_head_are_told_by_their_tensors(tmp_path, changes, reason):
    with pytest.raises(SpeculationError, match=reason):
        load(sidecar(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mtp_num_hidden_layers": 2}, "more than one layer"),
        ({"mtp_use_dedicated_embeddings": True}, "embeddings of its own"),
    ],
)
def test_other_kinds_of_head_are_told_by_the_configuration(tmp_path, changes, reason):
    config, trunk, head = oracle(DENSE)
    config["text_config"] |= changes
    files = {"model.safetensors": trunk | prefixed(head)}
    with pytest.raises(SpeculationError, match=reason):
        load(write(tmp_path, config, files))


def test_a_model_without_a_head_says_where_it_was_looked_for(tmp_path):
    folder = convert(DENSE, tmp_path)
    with pytest.raises(SpeculationError) as error:
        load(folder)
    message = str(error.value)
    for part in (
        str(folder),
        "optiq/mtp.safetensors, mtp.safetensors, mtp/weights.safetensors, ",
        "model.safetensors",
        "mlx_lm.convert",
        "--mtp PATH",
    ):
        assert part in message


def test_a_file_without_a_head_is_an_error(tmp_path):
    folder = convert(DENSE, tmp_path)
    with pytest.raises(SpeculationError, match=r"no MTP head in .*model\.safetensors"):
        load(folder / "model.safetensors")


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_place_that_is_none_is_an_error(source):
    with pytest.raises(SpeculationError, match=r"neither a folder .* nor a Hub id"):
        load(source)


def test_a_shard_that_is_indexed_and_absent_is_named(tmp_path):
    config, trunk, head = oracle(DENSE)
    shards = {
        "model-00001-of-00002.safetensors": trunk
        | {"mtp.fc.weight": head.pop("fc.weight")},
        "model-00002-of-00002.safetensors": prefixed(head),
    }
    folder = write(tmp_path, config, shards, with_index=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        SpeculationError, match=r"model-00002-of-00002\.safetensors with"
    ):
        load(folder)


@pytest.mark.parametrize("size", [0, 20, -100])
def test_a_damaged_file_is_named(tmp_path, size):
    folder = sidecar(tmp_path, {})
    file = folder / "mtp.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SpeculationError, match=r"mtp\.safetensors .* not a complete"):
        load(folder)


def test_a_file_of_another_format_is_named(tmp_path):
    file = tmp_path / "head.bin"
    file.write_bytes(b"head")
    with pytest.raises(SpeculationError, match=r"head\.bin .* safetensors file"):
        load(file)


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe\x00"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    folder = sidecar(tmp_path, {})
    file = folder / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpeculationError, match=r"config\.json is needed") as error:
        load(folder)
    assert error.value.__cause__ is not None


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    folder = convert(DENSE, tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps([]))
    with pytest.raises(SpeculationError, match=r"index\.json is needed"):
        load(folder)


@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_head_has_the_type_of_the_models_states(tmp_path, stored, dtype):
    *_, head = oracle(DENSE)
    cast = {name: x.astype(stored) for name, x in head.items()}
    found = load_head(sidecar(tmp_path, cast), text_args(DENSE), dtype)
    assert {x.dtype for x in parameters(found).values()} == {dtype}
    assert mx.array_equal(found.fc.weight, cast["fc.weight"].astype(dtype))
    x = mx.zeros((1, 2, 64), dtype)
    assert found(x, x).dtype == dtype


def test_loading_leaves_the_random_state_alone():
    mx.random.seed(11)
    mx.random.uniform()
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(11)
    mx.random.uniform()
    load(ORACLE / DENSE)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sidecar(tmp_path / "head", {})
    assert_same(load("~/head"), reference_head(DENSE))


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
@pytest.mark.parametrize("name", ["fc.weight", "norm.weight"])
def test_values_that_are_no_numbers_are_an_error(tmp_path, name, value):
    *_, head = oracle(DENSE)
    damaged = mx.array(head[name])
    damaged[..., 3] = value
    with pytest.raises(SpeculationError, match=rf"not finite numbers: {name}\."):
        load(sidecar(tmp_path, {name: damaged}))


def test_the_head_of_a_model_with_another_vocabulary_is_an_error(tmp_path):
    config, _, head = oracle(DENSE)
    config["text_config"]["vocab_size"] = 999
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    with pytest.raises(
        SpeculationError, match="vocab_size of 999, and the model of 320"
    ):
        load(folder)


@pytest.mark.parametrize("value", ["x", 5, [1], ["mtp.safetensors"], {"mtp_file": 7}])
def test_a_place_that_is_declared_with_a_wrong_type_hides_no_head(tmp_path, value):
    config, _, head = oracle(DENSE)
    config["mlx_lm_extra_tensors"] = value
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    assert_same(load(folder), reference_head(DENSE))


@pytest.mark.parametrize("content", [[], {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_of_a_wrong_type_is_named(tmp_path, content):
    folder = convert(DENSE, tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(SpeculationError, match=r"index\.json is needed"):
        load(folder)


def split(place: Path, with_index: bool = True) -> Path:
    """A raw checkpoint whose head has a shard of its own."""
    config, trunk, head = oracle(DENSE)
    shards = {
        "model-00001-of-00002.safetensors": trunk,
        "model-00002-of-00002.safetensors": prefixed(head),
    }
    return write(place, config, shards, with_index=with_index)


def wrong_head() -> dict[str, mx.array]:
    *_, head = oracle(DENSE)
    return prefixed({name: mx.ones(x.shape) for name, x in head.items()})


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("name", ["adapters.safetensors", "z.safetensors"])
def test_a_file_that_is_none_of_the_models_is_not_looked_at(tmp_path, with_index, name):
    folder = split(tmp_path, with_index)
    (folder / name).write_bytes(b"broken")
    assert_same(load(folder), reference_head(DENSE))
    write(folder, None, {name: wrong_head()})
    assert_same(load(folder), reference_head(DENSE))


def test_of_an_indexed_model_only_the_shards_of_the_head_must_be_whole(tmp_path):
    folder = split(tmp_path)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"broken")
    write(folder, None, {"model-old.safetensors": wrong_head()})
    found = load(folder)
    assert_same(found, reference_head(DENSE))


def test_a_tensor_that_is_stored_twice_is_an_error(tmp_path):
    folder = split(tmp_path, with_index=False)
    write(folder, None, {"model-old.safetensors": wrong_head()})
    with pytest.raises(SpeculationError, match=r"\.weight is in both .*-old"):
        load(folder)


def test_of_a_head_by_itself_the_file_that_is_broken_is_named(tmp_path):
    config, _, head = oracle(DENSE)
    write(tmp_path, config, {"any.safetensors": prefixed(head)})
    (tmp_path / "other.safetensors").write_bytes(b"broken")
    assert_same(load(tmp_path), reference_head(DENSE))
    (tmp_path / "any.safetensors").unlink()
    with pytest.raises(SpeculationError, match=r"other\.safetensors .* not a complete"):
        load(tmp_path)
