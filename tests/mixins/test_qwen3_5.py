"""Qwen3.5 models with a head attached stay what they are."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3, qwen3_5
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.heads import quantization_of, quantize_head
from mlx_optiq_ext.mixins import qwen3_5 as mixin
from mlx_optiq_ext.mixins.qwen3_5 import MTPMixin, attach_mtp
from tests.heads.variants import (
    DENSE,
    MOE,
    ORACLE,
    absolute,
    assert_same,
    convert,
    load,
    oracle,
    parameters,
    prefixed,
    reference_head,
    rewrite,
    unreadable,
    write,
)
from tests.helpers import load_tiny

KINDS = [DENSE, MOE]
NUM_PROMPT_TOKENS = 16

pytestmark = pytest.mark.filterwarnings("ignore:Speculation with an MTP head")


def golden(kind: str) -> dict[str, mx.array]:
    with np.load(ORACLE / kind / "golden.npz") as arrays:
        return {name: mx.array(x) for name, x in arrays.items()}


def attached(kind: str) -> Any:
    model = load(ORACLE / kind)
    attach_mtp(model)
    return model


def difference(found: mx.array, expected: mx.array) -> float:
    return mx.abs(found - expected).max().item()


def prefill(model: Any, expected: dict[str, mx.array], hidden: str, cache: Any = None):
    """Logits and states of the head over the prompt and the token after it."""
    n = NUM_PROMPT_TOKENS
    following = mx.argmax(expected["logits"][:, n - 1 : n], axis=-1)
    tokens = mx.concatenate([expected["ids"][:, 1:n], following], axis=1)
    states = model.mtp(model.embed(tokens), expected[hidden][:, :n], cache)
    return model.project(states), states


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_logits_of_the_model_are_those_of_transformers(kind):
    model, expected = attached(kind), golden(kind)
    hidden = model.hidden_states(expected["ids"])
    assert difference(hidden, expected["hidden"]) < 5e-4
    assert difference(model.project(hidden), expected["logits"]) < 5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_drafts_as_the_reference_does(kind):
    model, expected = attached(kind), golden(kind)
    cache, _ = model.make_mtp_cache()
    logits, states = prefill(model, expected, "hidden", cache)
    assert difference(states, expected["post_prefill"]) < 2e-5
    assert difference(logits, expected["post_prefill_logits"]) < 2e-5

    hidden = states[:, -1:]
    for step in range(4):
        hidden = model.mtp(model.embed(expected[f"post_tok{step}"]), hidden, cache)
        logits = model.project(hidden)
        bound = 2e-5 if step == 0 else 1e-3
        assert difference(logits, expected[f"post_s{step}_logits"]) < bound
        assert difference(hidden, expected[f"post_s{step}_h"]) < bound
    assert cache.offset == NUM_PROMPT_TOKENS + 4


def leave_norms_zero_centred(head: Any) -> None:
    for module in head.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = module.weight - 1


def swap_inputs(head: Any) -> None:
    head.fc.weight = mx.concatenate(mx.split(head.fc.weight, 2, axis=1)[::-1], axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "hidden"),
    [
        (leave_norms_zero_centred, "hidden"),
        (swap_inputs, "hidden"),
        (lambda head: None, "hidden_pre"),
    ],
    ids=["zero-centred norms", "swapped inputs", "states before the norm"],
)
def test_a_head_that_is_used_wrongly_is_far_from_the_reference(
    kind: str, spoil: Callable[[Any], None], hidden: str
):
    model, expected = attached(kind), golden(kind)
    spoil(model.mtp)
    logits, _ = prefill(model, expected, hidden)
    assert difference(logits, expected["post_prefill_logits"]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_states_do_not_depend_on_the_cache_or_on_how_tokens_are_embedded(kind):
    model, ids = attached(kind), golden(kind)["ids"]
    whole = model.hidden_states(ids)
    cache = model.make_cache() + model.make_mtp_cache()
    chunks = [model.hidden_states(ids[:, a:b], cache) for a, b in ((0, 9), (9, 21))]
    assert difference(mx.concatenate(chunks, axis=1), whole) < 5e-4
    embeddings = model.embed(ids)
    assert mx.array_equal(model.hidden_states(ids * 0, None, embeddings), whole)
    assert mx.array_equal(model.project(whole), model(ids))


def tied(folder: Path) -> Path:
    config, trunk, head = oracle(DENSE)
    config["tie_word_embeddings"] = True
    config["text_config"]["tie_word_embeddings"] = True
    del trunk["lm_head.weight"]
    return write(folder, config, {"model.safetensors": trunk | prefixed(head)})


def raw(kind: str) -> Callable[[Path], Path]:
    return lambda folder: ORACLE / kind


def quantised(kind: str, **params: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        *_, head = oracle(kind)
        return rewrite(
            convert(kind, folder, quant_predicate=is_divisible, **params),
            prefixed(absolute(head), "language_model.mtp."),
        )

    return make


def is_divisible(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


MODELS = {
    "dense": raw(DENSE),
    "moe": raw(MOE),
    "tied": tied,
    "dense-4bit": quantised(DENSE, group_size=32, bits=4),
    "dense-mxfp4": quantised(DENSE, group_size=32, bits=4, mode="mxfp4"),
    "moe-4bit": quantised(MOE, group_size=32, bits=4),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_attaching_leaves_the_model_as_it_was(make, tmp_path):
    model = load(make(tmp_path))
    model_class = type(model)
    before = dict(tree_flatten(model.parameters()))
    modules = [id(module) for module in model.modules()]
    keys = list(model)
    ids = mx.array([[5, 9, 2, 7]])
    logits = model(ids)

    head = attach_mtp(model)
    assert isinstance(model, MTPMixin)
    assert isinstance(model, model_class)
    for name in ("__name__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(model_class, name)
    assert model.mtp is record_of(model).head is head

    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert [id(module) for module in model.modules()] == modules
    assert list(model) == keys
    assert mx.array_equal(model(ids), logits)
    assert mx.array_equal(model.project(model.hidden_states(ids)), logits)
    assert head.fc.weight.dtype == model.hidden_states(ids).dtype
    assert model.project(head(model.embed(ids), model.hidden_states(ids))).shape == (
        1,
        4,
        320,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_converted_models_get_the_same_head(kind, tmp_path):
    *_, head = oracle(kind)
    folder = convert(kind, tmp_path)
    write(folder, None, {"optiq/mtp.safetensors": prefixed(head)})
    assert_same(attach_mtp(load(folder)), reference_head(kind))


def test_two_models_of_a_class_share_the_class_and_not_the_head():
    first, second = attached(DENSE), attached(DENSE)
    assert type(first) is type(second)
    assert first.mtp is not second.mtp
    assert type(load(ORACLE / DENSE)) is qwen3_5.Model


def test_the_head_is_loaded_once_and_replaced_when_another_is_asked_for(tmp_path):
    model = load(ORACLE / DENSE)
    own = attach_mtp(model)
    assert attach_mtp(model) is own
    assert attach_mtp(model, str(ORACLE / DENSE)) is own

    *_, head = oracle(DENSE)
    head["fc.weight"] = head["fc.weight"] * 2
    other = write(tmp_path, None, {"x.safetensors": prefixed(head)}) / "x.safetensors"
    found = attach_mtp(model, other)
    assert model.mtp is found is not own
    assert mx.array_equal(found.fc.weight, own.fc.weight * 2)
    assert attach_mtp(model, str(other)) is found

    with pytest.raises(SpeculationError):
        attach_mtp(model, tmp_path / "nowhere")
    assert model.mtp is found
    assert attach_mtp(model) is not found


def test_a_wider_head_does_not_widen_what_the_model_computes():
    model = load(ORACLE / DENSE)
    model.set_dtype(mx.bfloat16)
    head = attach_mtp(model)
    assert {x.dtype for x in parameters(head).values()} == {mx.bfloat16}
    ids = mx.array([[5, 9]])
    states = head(model.embed(ids), model.hidden_states(ids))
    assert states.dtype == model.project(states).dtype == mx.bfloat16


def kinds(head: Any) -> dict[str, Any]:
    found = quantization_of(head)
    return {path: (x["bits"], x["mode"]) for path, x in found.items()}


@pytest.mark.parametrize("name", ["dense-4bit", "moe-4bit"])
def test_a_head_in_full_is_quantised_as_its_model_is(name: str) -> None:
    head = attach_mtp(load_tiny(name))
    found = kinds(head)
    assert set(found.values()) == {(4, "affine")}
    assert "fc" not in found
    assert all("norm" not in path and path[-4:] != "gate" for path in found)


@pytest.mark.parametrize(
    ("name", "mtp_bits", "expected"),
    [
        ("dense-4bit", 0, set()),
        ("dense-4bit", 8, {(8, "affine")}),
        ("dense", None, set()),
        ("dense-bf16", None, set()),
    ],
)
def test_a_head_is_kept_in_the_bits_that_are_asked_for(
    name: str, mtp_bits: int | None, expected: set[Any]
) -> None:
    model = load_tiny(name)
    head = attach_mtp(model, mtp_bits=mtp_bits)
    assert set(kinds(head).values()) == expected
    assert attach_mtp(model, mtp_bits=mtp_bits) is head
    assert record_of(model).is_head_quantized == bool(expected)


def test_a_head_that_is_stored_quantised_stays_as_it_is(tmp_path: Path) -> None:
    config, _, _ = oracle(DENSE)
    head = quantize_head(
        reference_head(DENSE), {"group_size": 32, "bits": 8, "mode": "affine"}
    )
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(parameters(head))})
    found = attach_mtp(load_tiny("dense-4bit"), folder, mtp_bits=4)
    assert set(kinds(found).values()) == {(8, "affine")}


@pytest.mark.parametrize("mtp_bits", [1, 7, -4, True, "4"])
def test_bits_that_there_are_no_kernels_for_are_refused(mtp_bits: Any) -> None:
    with pytest.raises(ValueError, match="mtp_bits must be 0, 2, 3, 4, 5, 6 or 8"):
        attach_mtp(load_tiny("dense"), mtp_bits=mtp_bits)


def test_attaching_computes_nothing_with_the_model(tmp_path):
    model = load(ORACLE / DENSE)
    layer = model.language_model.model.layers[0]
    layer.mlp.down_proj.weight = unreadable(tmp_path, (64, 96))
    attach_mtp(model)
    with pytest.raises(RuntimeError):
        mx.eval(model.hidden_states(mx.array([[1]])))


def test_a_model_with_adapters_gets_its_head():
    model = load(ORACLE / DENSE)
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, 4, config)
    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert any("lora_a" in name for name in trainable)
    assert_same(attach_mtp(model), reference_head(DENSE))
    ids = mx.array([[5, 9, 2]])
    assert mx.array_equal(model.project(model.hidden_states(ids)), model(ids))


def test_another_type_of_model_is_named(tmp_path):
    args = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1}
    args |= {"intermediate_size": 32, "num_attention_heads": 1, "rms_norm_eps": 1e-6}
    args |= {"vocab_size": 8, "num_key_value_heads": 1, "max_position_embeddings": 8}
    args |= {"rope_theta": 1e4, "head_dim": 32, "tie_word_embeddings": True}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(args))
    with pytest.raises(SpeculationError, match="of type qwen3, and only qwen3_5"):
        attach_mtp(model, tmp_path)


def test_a_model_of_unknown_origin_needs_a_place():
    config, *_ = oracle(DENSE)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    with pytest.raises(SpeculationError, match=r"mlx_lm\.load did not load it"):
        attach_mtp(model)
    assert_same(attach_mtp(model, ORACLE / DENSE), reference_head(DENSE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_distributed_model_is_an_error(kind):
    model = load(ORACLE / kind)
    model.shard(mx.distributed.init())
    with pytest.raises(SpeculationError, match="is distributed"):
        attach_mtp(model)

    model = load(ORACLE / kind)
    model.model.pipeline_size = 2
    with pytest.raises(SpeculationError, match="is distributed"):
        attach_mtp(model)


def test_a_folder_that_is_gone_is_named(tmp_path):
    model = load(ORACLE / DENSE)
    record_of(model).source = tmp_path / "gone"
    with pytest.raises(SpeculationError, match="gone is neither"):
        attach_mtp(model)


def test_of_a_small_model_is_warned_once():
    mixin._warn_of_small_model.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached(DENSE)
        attached(MOE)
    messages = [str(w.message) for w in caught if "MTP" in str(w.message)]
    assert len(messages) == 1
    assert "less than about 4B parameters" in messages[0]
    assert caught[0].filename == __file__


def test_a_head_of_another_model_is_an_error(tmp_path):
    config = json.loads((ORACLE / MOE / "config.json").read_text())
    *_, head = oracle(MOE)
    folder = write(tmp_path, config, {"mtp.safetensors": prefixed(head)})
    with pytest.raises(SpeculationError, match="it is the head of another model"):
        attach_mtp(load(ORACLE / DENSE), folder)


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_is_the_model_that_mlx_lm_loaded(copied: Any) -> None:
    """It knows where the model came from, and attaches the head again from there."""
    model = load_tiny("dense")
    original = type(model)
    attach_mtp(model)
    found = copied(model)
    assert type(found) is original
    assert record_of(found).source == record_of(model).source
    assert record_of(found).head is None
    tokens = mx.array([[3, 1, 4]])
    assert mx.array_equal(found(tokens), model(tokens)).item()
    attach_mtp(found)
    assert found.mtp is not model.mtp
    names = [name for name, _ in tree_flatten(found.parameters())]
    assert names == [name for name, _ in tree_flatten(model.parameters())]
