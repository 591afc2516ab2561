"""Gemma-4 models show what assistants read and stay what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4, gemma4_text, qwen3
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.mixins.gemma4 import SharedKVMixin, attach_shared_kv
from mlx_optiq_ext.rollback import Transaction
from tests.gemma import (
    A4B,
    E4B,
    KINDS,
    TYPES,
    WINDOW,
    difference,
    golden,
    load_target,
    target_folder,
)

FULL, SLIDING = TYPES


def attached(kind: str) -> Any:
    model = load_target(kind)
    attach_shared_kv(model)
    return model


def wrapped(model_type: str) -> Callable[[str, Path], Any]:
    """A multimodal checkpoint around the text model."""

    def load_wrapped(kind: str, folder: Path) -> Any:
        text = json.loads((target_folder(kind) / "config.json").read_text())
        config = {"model_type": model_type, "vocab_size": 512, "text_config": text}
        weights = mx.load(str(target_folder(kind) / "model.safetensors"))
        renamed = {
            f"model.language_model.{name.removeprefix('model.')}": x
            for name, x in weights.items()
        }
        (folder / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "model.safetensors"), renamed)
        model, _ = load_model(folder)
        return model

    return load_wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_logits_of_the_model_are_those_of_transformers(kind):
    model, expected = attached(kind), golden(kind)
    hidden = model.hidden_states(expected["ids"])
    assert difference(hidden, expected["hidden"]) < 5e-4
    assert difference(model.project(hidden), expected["logits"]) < 5e-4


@pytest.mark.parametrize(
    ("load", "model_class"),
    [
        (lambda kind, folder: load_target(kind), gemma4_text.Model),
        (wrapped("gemma4"), gemma4.Model),
        (wrapped("gemma4_unified"), gemma4.Model),
    ],
    ids=["gemma4_text", "gemma4", "gemma4_unified"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_attaching_leaves_the_model_as_it_was(kind, load, model_class, tmp_path):
    model = load(kind, tmp_path)
    assert type(model) is model_class
    before = dict(tree_flatten(model.parameters()))
    modules, keys = [id(module) for module in model.modules()], list(model)
    ids = mx.array([[5, 9, 2, 7]])
    logits = model(ids)

    attach_shared_kv(model)
    changed_class = type(model)
    attach_shared_kv(model)
    assert type(model) is changed_class
    assert isinstance(model, SharedKVMixin)
    assert isinstance(model, model_class)
    assert changed_class.__name__ == model_class.__name__

    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert [id(module) for module in model.modules()] == modules
    assert list(model) == keys
    assert mx.array_equal(model(ids), logits)
    assert mx.array_equal(model.project(model.hidden_states(ids)), logits)


def test_an_untied_head_without_a_cap_is_projected_as_the_model_does():
    args = load_target(A4B).args
    args.tie_word_embeddings, args.final_logit_softcapping = False, None
    model = gemma4_text.Model(args)
    attach_shared_kv(model)
    ids = mx.array([[5, 9, 2]])
    logits = model(ids)
    assert mx.abs(logits).max() > 0
    assert mx.array_equal(model.project(model.hidden_states(ids)), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_stand_in_for_tokens(kind):
    model, ids = attached(kind), golden(kind)["ids"]
    embeddings = model.model.embed_tokens(ids)
    found = model.hidden_states(ids, None, embeddings)
    assert mx.array_equal(found, model.hidden_states(ids))


def test_embeddings_are_scaled_in_the_type_of_the_model():
    model = attached(E4B)
    model.set_dtype(mx.bfloat16)
    # The root of 2560, as E4B has it, is 50.5 in bfloat16.
    model.model.embed_scale = 2560**0.5
    embeddings = model.embed(mx.array([5]))
    assert embeddings.dtype == mx.bfloat16
    plain = model.model.embed_tokens(mx.array([5])).astype(mx.float32)
    assert mx.array_equal(embeddings, (plain * 50.5).astype(mx.bfloat16))


@pytest.mark.parametrize(
    ("kind", "donors"), [(E4B, {FULL: 4, SLIDING: 5}), (A4B, {FULL: 5, SLIDING: 4})]
)
def test_the_last_layers_with_own_keys_and_values_give_theirs(kind, donors):
    model = attached(kind)
    assert model.donors == donors
    assert len(make_prompt_cache(model)) > max(donors.values())


def test_a_model_with_the_layers_of_e4b_gives_those_of_23_and_22():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    sizes |= {"num_attention_heads": 1, "head_dim": 8, "global_head_dim": 8}
    sizes |= {"vocab_size_per_layer_input": 8, "hidden_size_per_layer_input": 8}
    layers = {"num_hidden_layers": 42, "num_kv_shared_layers": 18}
    pattern = {"sliding_window_pattern": 6}
    args = gemma4_text.ModelArgs.from_dict(sizes | layers | pattern)
    model = gemma4_text.Model(args)
    attach_shared_kv(model)
    assert model.donors == {FULL: 23, SLIDING: 22}


def feed(model: Any, cache: list[Any], ids: mx.array, *sizes: int) -> None:
    start = 0
    for size in sizes:
        model(ids[:, start : start + size], cache=cache)
        start += size


def feed_and_reject(model: Any, cache: list[Any], ids: mx.array, *kept: int) -> None:
    """Passes of five rows, the last of them wrong, of which some are kept."""
    start = 0
    for num_kept in kept:
        rows = mx.concatenate(
            [ids[:, start : start + num_kept], mx.full((1, 5 - num_kept), 7)], axis=1
        )
        transaction = Transaction(cache)
        transaction.run(
            lambda entries, n, rows=rows: model(rows[:, :n], cache=entries), 5
        )
        transaction.keep(num_kept)
        start += num_kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("advance", "steps"),
    [
        (feed, (6,)),
        (feed, (29,)),
        (feed, (12, 12, 5)),
        (feed, (5, *[1] * 3)),
        (feed, (20, *[1] * 9)),
        (feed, (20, 1, 4, *[1] * 4)),
        (feed_and_reject, (3, 3)),
        (feed_and_reject, (5, 5, 1, 2, 4, 1, 1, 5, 2, 3)),
    ],
)
def test_keys_and_values_are_those_of_transformers_in_the_order_of_the_tokens(
    kind, advance, steps
):
    model, expected = attached(kind), golden(kind)
    cache = make_prompt_cache(model)
    advance(model, cache, expected["ids"], *steps)
    num_tokens, found = sum(steps), model.shared_kv(cache)
    for layer_type in TYPES:
        for array, name in zip(found[layer_type], "kv", strict=True):
            whole = expected[f"skv_{layer_type}_{name}"][..., :num_tokens, :]
            num_held = array.shape[-2]
            assert num_held >= (WINDOW if layer_type == SLIDING else 29) or (
                num_held == num_tokens
            )
            assert difference(array, whole[..., num_tokens - num_held :, :]) < 1e-4


def test_trimmed_tokens_are_not_shown():
    model, ids = attached(E4B), golden(E4B)["ids"]
    cache = make_prompt_cache(model)
    feed(model, cache, ids, 4, 1, 1, 1)
    trim_prompt_cache(cache, 2)
    expected = make_prompt_cache(model)
    feed(model, expected, ids, 5)
    for layer_type, arrays in model.shared_kv(expected).items():
        for one, other in zip(arrays, model.shared_kv(cache)[layer_type], strict=True):
            assert difference(one, other) < 1e-4


def test_quantised_keys_and_values_are_dequantised():
    model, ids = attached(A4B), golden(A4B)["ids"]
    cache = make_prompt_cache(model)
    feed(model, cache, ids, 21)
    expected = model.shared_kv(cache)[FULL]
    index = model.donors[FULL]
    assert isinstance(cache[index], KVCache)
    cache[index] = cache[index].to_quantized(group_size=32, bits=8)
    model(ids[:, 21:22], cache=cache)
    for exact, found in zip(expected, model.shared_kv(cache)[FULL], strict=True):
        assert found.shape[-2] == 22
        assert found.dtype == exact.dtype
        rounding = difference(found[..., :21, :], exact)
        assert 0 < rounding < 0.02


def test_another_type_of_model_is_named():
    args = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1}
    args |= {"intermediate_size": 32, "num_attention_heads": 1, "rms_norm_eps": 1e-6}
    args |= {"vocab_size": 8, "num_key_value_heads": 1, "max_position_embeddings": 8}
    args |= {"rope_theta": 1e4, "head_dim": 32, "tie_word_embeddings": True}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(args))
    with pytest.raises(SpeculationError, match="of type qwen3, and only gemma4"):
        attach_shared_kv(model)
    with pytest.raises(SpeculationError, match="of type Linear"):
        attach_shared_kv(nn.Linear(1, 1))
