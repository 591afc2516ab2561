"""Assistants compute what transformers computes, and draft for their targets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import save_model

from mlx_optiq_ext import SpeculationError, SpeculationStats, spec_generate_step
from mlx_optiq_ext.assistants import load_assistant
from mlx_optiq_ext.assistants._model import NUM_BEYOND_WINDOW
from mlx_optiq_ext.decoding._acceptance import rule_for
from mlx_optiq_ext.drafters import GemmaAssistantDrafter
from tests.gemma import (
    A4B,
    E4B,
    KINDS,
    TYPES,
    VOCAB_SIZE,
    WINDOW,
    GuidedDrafter,
    assistant_folder,
    copy,
    difference,
    golden,
    golden_kv,
    load_drafter,
    load_target,
    target_folder,
)
from tests.heads.test_hub import snapshot
from tests.helpers import (
    assert_same_cache,
    assert_same_tokens,
    often_right,
)

FULL, SLIDING = TYPES
# What a float32 target of random weights loses when its ring has another order.


@cache
def target_of(kind: str, window: int = WINDOW) -> Any:
    return load_target(kind, sliding_window=window)


@cache
def assistant_of(kind: str) -> Any:
    return load_assistant(assistant_folder(kind))


def bound(kind: str) -> GemmaAssistantDrafter:
    return GemmaAssistantDrafter(assistant_of(kind)).bind(target_of(kind))


# Goldens of transformers.


def first_step(kind: str, num_tokens: int, **changed: Any) -> tuple[mx.array, mx.array]:
    """Logits and state of the first step, with inputs of the reference or others."""
    expected, target, assistant = golden(kind), target_of(kind), assistant_of(kind)
    bound(kind)
    inputs = {
        "embedding": target.embed(expected[f"a{num_tokens}_tok0"]),
        "hidden": expected[f"a{num_tokens}_hid0"],
        "shared_kv": assistant.visible(golden_kv(expected, num_tokens)),
        "position": num_tokens,
    }
    return assistant(**inputs | changed)


def distance(logits: mx.array, expected: mx.array) -> float:
    """The difference where a centroid head has logits at all."""
    is_scored = mx.isfinite(logits)
    return mx.abs(mx.where(is_scored, logits - expected, 0)).max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [6, 29])
@pytest.mark.parametrize(("name", "offset"), [("pN", 0), ("pNm1", -1)])
def test_five_steps_are_those_of_transformers(kind, num_tokens, name, offset):
    expected, target, assistant = golden(kind), target_of(kind), assistant_of(kind)
    bound(kind)
    shared_kv = assistant.visible(golden_kv(expected, num_tokens))
    token, hidden = (expected[f"a{num_tokens}_{x}"] for x in ("tok0", "hid0"))
    for step in range(5):
        prefix = f"a{num_tokens}_{name}_s{step}"
        logits, hidden = assistant(
            target.embed(token), hidden, shared_kv, num_tokens + offset
        )
        bound_ = 2e-5 if step == 0 else 1e-3
        assert distance(logits, expected[f"{prefix}_logits"]) < bound_
        assert difference(hidden, expected[f"{prefix}_h"]) < bound_
        token = expected[f"{prefix}_tok"]
        assert mx.argmax(logits, axis=-1).item() == token.item()


def test_a_centroid_head_scores_the_tokens_that_transformers_does_and_no_others():
    expected, (logits, _) = golden(E4B)["a6_pN_s0_logits"], first_step(E4B, 6)
    is_scored = mx.isfinite(logits)
    assert is_scored.sum().item() == 4 * VOCAB_SIZE // 32
    # Transformers fills the rest with one value below all others.
    assert mx.array_equal(is_scored, expected > expected.min())
    assert mx.all(mx.isfinite(first_step(A4B, 6)[0]))


def swapped(kind: str, n: int) -> dict[str, Any]:
    expected, target = golden(kind), target_of(kind)
    embedding = target.embed(expected[f"a{n}_tok0"])
    return {"embedding": expected[f"a{n}_hid0"], "hidden": embedding}


def unscaled(kind: str, n: int) -> dict[str, Any]:
    token = golden(kind)[f"a{n}_tok0"]
    return {"embedding": target_of(kind).model.embed_tokens(token)}


def earlier(kind: str, n: int) -> dict[str, Any]:
    return {"position": n - 1}


def narrower(num_fewer: int) -> Callable[[str, int], dict[str, Any]]:
    def cut(kind: str, n: int) -> dict[str, Any]:
        shared_kv = assistant_of(kind).visible(golden_kv(golden(kind), n))
        sliding = tuple(x[..., num_fewer:, :] for x in shared_kv[SLIDING])
        return {"shared_kv": shared_kv | {SLIDING: sliding}}

    return cut


def uncut(kind: str, n: int) -> dict[str, Any]:
    return {"shared_kv": golden_kv(golden(kind), n)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spoil", [swapped, unscaled, earlier, narrower(1), narrower(2), uncut]
)
def test_an_assistant_that_is_used_wrongly_is_far_from_transformers(kind, spoil):
    expected = golden(kind)["a29_pN_s0_h"]
    _, right = first_step(kind, 29)
    _, wrong = first_step(kind, 29, **spoil(kind, 29))
    assert difference(right, expected) < 2e-5
    assert difference(wrong, expected) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_only_sliding_layers_look_no_further_than_the_window(kind):
    seen = assistant_of(kind).visible(golden_kv(golden(kind), 29))
    assert seen[FULL][0].shape[-2] == 29
    assert seen[SLIDING][0].shape[-2] == WINDOW + NUM_BEYOND_WINDOW == 9
    seen = assistant_of(kind).visible(golden_kv(golden(kind), 6))
    assert seen[SLIDING][0].shape[-2] == 6


# Live loops: draft, verify, roll back.


def prompt_of(num_tokens: int) -> mx.array:
    return mx.random.randint(3, VOCAB_SIZE, (num_tokens,), key=mx.random.key(7))


def plain(model: Any, prompt: mx.array, max_tokens: int, **options: Any) -> list[Any]:
    return list(generate_step(prompt, model, max_tokens=max_tokens, **options))


def guided(kind: str, script: list[int], **options: Any) -> GuidedDrafter:
    """An assistant that is often right about what plain decoding emits."""
    drafter = GemmaAssistantDrafter(assistant_of(kind))
    return GuidedDrafter(drafter, script, often_right, **options)


@cache
def script_of(kind: str, num_prompt_tokens: int) -> list[int]:
    steps = plain(target_of(kind), prompt_of(num_prompt_tokens), 24)
    return [token for token, _ in steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_draft_tokens", "num_prompt_tokens"), [(1, 30), (2, 1), (3, 30), (4, 1)]
)
def test_below_the_window_all_is_equal_to_the_bit(
    kind, num_draft_tokens, num_prompt_tokens
):
    model, prompt = target_of(kind, 80), prompt_of(num_prompt_tokens)
    caches = [make_prompt_cache(model) for _ in range(2)]
    expected = plain(model, prompt, 30, prompt_cache=caches[0])
    stats = SpeculationStats()
    speculative = list(
        spec_generate_step(
            prompt,
            model,
            drafter=guided(kind, [token for token, _ in expected]),
            num_draft_tokens=num_draft_tokens,
            max_tokens=30,
            prompt_cache=caches[1],
            stats=stats,
        )
    )
    assert_same_tokens(expected, speculative)
    assert_same_cache(*caches)
    assert 0 < stats.num_accepted < stats.num_drafted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_draft_tokens", "num_prompt_tokens", "num_taken"),
    [
        (1, 6, 24),
        (1, 29, 17),
        (2, 1, 15),
        (2, 8, 24),
        (3, 6, 16),
        (3, 29, 24),
        (4, 8, 17),
        (4, 1, 18),
    ],
)
def test_past_the_window_all_is_equal_to_the_bit(
    kind, num_draft_tokens, num_prompt_tokens, num_taken
):
    model, prompt = target_of(kind), prompt_of(num_prompt_tokens)
    caches = [make_prompt_cache(model) for _ in range(2)]
    steps = spec_generate_step(
        prompt,
        model,
        drafter=guided(kind, script_of(kind, num_prompt_tokens)),
        num_draft_tokens=num_draft_tokens,
        max_tokens=24,
        prompt_cache=caches[1],
        prefill_step_size=11,
    )
    speculative = list(itertools.islice(steps, num_taken))
    steps.close()
    # mlx-lm's cache holds every token yielded once the generator is closed.
    expected = plain(model, prompt, num_taken, prompt_cache=caches[0])
    assert_same_tokens(expected, speculative)
    assert_same_cache(*caches)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_transformers(kind):
    with np.load(target_folder(kind) / "golden.npz") as arrays:
        ids = arrays["greedy"][0].tolist()
    steps = spec_generate_step(
        mx.array(ids[:12]),
        target_of(kind),
        drafter=load_drafter(kind),
        num_draft_tokens=4,
        max_tokens=24,
    )
    assert [token for token, *_ in steps] == ids[12:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_the_assistant_reads_accepted_tokens_only(kind, num_draft_tokens):
    model, prompt = target_of(kind), prompt_of(5)
    num_checked = 0

    def watch(target: Any, prompt_cache: list[Any], num_emitted: int) -> None:
        nonlocal num_checked
        num_checked += 1
        tokens = prompt.tolist() + drafter.script[: num_emitted - 1]
        exact = [
            type(entry)(*((10**6,) if hasattr(entry, "max_size") else ()))
            for entry in prompt_cache
        ]
        target(mx.array([tokens]), cache=exact)
        found = target.shared_kv(prompt_cache)
        for layer_type, arrays in target.shared_kv(exact).items():
            for whole, array in zip(arrays, found[layer_type], strict=True):
                num_held = array.shape[-2]
                least = len(tokens) if layer_type == FULL else WINDOW
                assert num_held >= min(least, len(tokens))
                assert difference(array, whole[..., -num_held:, :]) < 1e-4

    drafter = guided(kind, script_of(kind, prompt.size), watch=watch)
    options = {"drafter": drafter, "num_draft_tokens": num_draft_tokens}
    list(spec_generate_step(prompt, model, max_tokens=24, **options))
    assert num_checked > 6


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_the_whole_text_without_a_cache(kind):
    model, prompt, assistant = target_of(kind, 80), prompt_of(5), assistant_of(kind)
    script = [token for token, _ in plain(model, prompt, 20)]
    drafter = guided(kind, script)
    options = {"drafter": drafter, "num_draft_tokens": 3}
    list(spec_generate_step(prompt, model, max_tokens=20, **options))
    assert len({num_emitted for num_emitted, *_ in drafter.proposed}) < 15
    for num_emitted, drafts, logits in drafter.proposed:
        *tokens, last = prompt.tolist() + script[:num_emitted]
        cache = make_prompt_cache(model)
        hidden = model.hidden_states(mx.array([tokens]), cache)[:, -1:]
        shared_kv = assistant.visible(model.shared_kv(cache))
        for token in [mx.array([last]), *drafts]:
            embedding = model.embed(token)[None]
            expected, hidden = assistant(embedding, hidden, shared_kv, len(tokens))
        assert distance(logits, expected[:, -1]) < 1e-3
        assert mx.array_equal(mx.isfinite(logits), mx.isfinite(expected[:, -1]))


def queries(
    kind: str, num_draft_tokens: int, prompt_cache: list[Any], **options: Any
) -> list[tuple[int, int]]:
    """The position of each draft step, and how many tokens the target had seen."""
    assistant, model = load_assistant(assistant_folder(kind)), target_of(kind)
    calls: list[tuple[int, int]] = []

    class Watched(type(assistant)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            calls.append((options["position"], prompt_cache[0].offset))
            return super().__call__(*args, **options)

    assistant.__class__ = Watched
    drafter = GemmaAssistantDrafter(assistant, **options)
    prompt = prompt_of(14)
    embeddings = model.model.embed_tokens(prompt)
    no_tokens = mx.array([], mx.uint32)
    for tokens, inputs in (
        (prompt, None),
        (prompt, embeddings),
        (no_tokens, embeddings),
    ):
        steps = spec_generate_step(
            tokens,
            model,
            drafter=drafter,
            num_draft_tokens=num_draft_tokens,
            max_tokens=12,
            prompt_cache=prompt_cache,
            prefill_step_size=5,
            input_embeddings=inputs,
        )
        list(steps)
    return calls


@pytest.mark.parametrize(
    ("options", "offset"),
    [({}, 0), ({"query_offset": 0}, 0), ({"query_offset": -1}, -1)],
)
def test_all_steps_of_a_draft_have_the_position_of_the_last_token(options, offset):
    calls = queries(A4B, 3, make_prompt_cache(target_of(A4B)), **options)
    assert len(calls) > 30
    assert all(position == num_tokens + offset for position, num_tokens in calls)


@pytest.mark.parametrize("query_offset", [1, -2, None, 0.5])
def test_no_other_position_can_be_asked_for(query_offset):
    with pytest.raises(ValueError, match="query_offset must be 0 or -1, got"):
        load_drafter(E4B, query_offset=query_offset)


def test_a_second_turn_goes_on_with_the_cache_of_the_first(tmp_path):
    model, file = target_of(E4B), str(tmp_path / "cache.safetensors")
    caches = [make_prompt_cache(model), make_prompt_cache(model)]
    num_entries = len(caches[0])
    for turn in (prompt_of(13), prompt_of(3), prompt_of(20)):
        options = {"drafter": load_drafter(E4B), "num_draft_tokens": 3}
        speculative = list(
            spec_generate_step(
                turn, model, max_tokens=15, prompt_cache=caches[1], **options
            )
        )
        expected = plain(model, turn, 15, prompt_cache=caches[0])
        assert_same_tokens(expected, speculative)
        assert_same_cache(*caches)
        save_prompt_cache(file, caches[1])
        caches[1] = load_prompt_cache(file)
    assert len(caches[1]) == num_entries


def test_quantised_keys_and_values_of_full_layers_are_read():
    model, prompt = target_of(A4B), prompt_of(30)
    caches = [make_prompt_cache(model) for _ in range(2)]
    for entries in caches:
        assert isinstance(entries[5], KVCache)
        entries[5] = entries[5].to_quantized(group_size=32, bits=8)
    expected = plain(model, prompt, 30, prompt_cache=caches[0])
    drafter = guided(A4B, [token for token, _ in expected])
    options = {"drafter": drafter, "num_draft_tokens": 2}
    speculative = list(
        spec_generate_step(
            prompt, model, max_tokens=30, prompt_cache=caches[1], **options
        )
    )
    assert [token for token, *_ in expected] == [token for token, *_ in speculative]


def test_rings_cannot_be_quantised_with_or_without_an_assistant():
    options = {"max_tokens": 5, "kv_bits": 8, "quantized_kv_start": 0}
    with pytest.raises(NotImplementedError) as plainly:
        list(generate_step(prompt_of(9), target_of(E4B), **options))
    options |= {"drafter": load_drafter(E4B)}
    with pytest.raises(NotImplementedError) as speculatively:
        list(spec_generate_step(prompt_of(9), target_of(E4B), **options))
    assert str(plainly.value) == str(speculatively.value)
    # Past the start, and nothing is quantised.
    options |= {"quantized_kv_start": 50}
    speculative = list(spec_generate_step(prompt_of(9), target_of(E4B), **options))
    assert len(speculative) == 5


def test_states_of_half_precision_are_drafted_from():
    model, prompt = load_target(E4B, sliding_window=100), prompt_of(9)
    model.set_dtype(mx.bfloat16)
    expected = plain(model, prompt, 20)
    speculative = list(
        spec_generate_step(
            prompt, model, drafter=load_drafter(E4B), num_draft_tokens=2, max_tokens=20
        )
    )
    assert_same_tokens(expected, speculative)


def test_an_assistant_computes_in_its_own_type():
    assistant, expected = load_assistant(assistant_folder(A4B)), golden(A4B)
    assistant.set_dtype(mx.bfloat16)
    hidden = expected["a6_hid0"]
    seen = assistant.visible(golden_kv(expected, 6))
    logits, state = assistant(hidden, hidden, seen, 6)
    assert logits.dtype == state.dtype == seen[FULL][0].dtype == mx.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 1.0},
        {"temp": 0.7, "top_p": 0.9, "top_k": 40},
        {"temp": 1, "min_p": 0.1},
    ],
)
def test_drawn_tokens_are_those_of_the_same_seed(kind, settings):
    texts = []
    for _ in range(2):
        mx.random.seed(3)
        steps = spec_generate_step(
            prompt_of(20),
            target_of(kind),
            drafter=load_drafter(kind),
            num_draft_tokens=2,
            max_tokens=12,
            sampler=make_sampler(**settings),
            logits_processors=make_logits_processors(repetition_penalty=1.1),
        )
        texts.append([(token, is_draft) for token, _, is_draft in steps])
    assert texts[0] == texts[1]
    assert len({token for token, _ in texts[0]}) > 5


def test_tokens_without_a_score_keep_the_distribution_of_the_target():
    rule, num_rows = rule_for(make_sampler(temp=2.0)), 30_000
    p, q = (
        mx.broadcast_to(x - mx.logsumexp(x), (num_rows, VOCAB_SIZE))
        for x in (golden(E4B)["logits"][:, 5], first_step(E4B, 6)[0][:, 0])
    )
    mx.random.seed(0)
    draft = rule.propose(q)
    tokens, is_accepted = rule.judge(p, draft)
    assert mx.all(mx.isfinite(mx.take_along_axis(q, draft.token[:, None], axis=1)))
    assert 0 < is_accepted.mean().item() < 1
    share = np.bincount(np.array(tokens), minlength=VOCAB_SIZE) / num_rows
    expected = np.array(mx.softmax(golden(E4B)["logits"][0, 5] / 2))
    # Chance alone makes it 0.05.
    assert np.abs(share - expected).sum() / 2 < 0.07


# Checkpoints.


Edit = Callable[[dict[str, Any]], None]


def edited(folder: Path, kind: str, edit: Edit | None = None) -> Path:
    return copy(assistant_folder(kind), folder / "assistant", edit)


def write_weights(folder: Path, **changed: mx.array | None) -> None:
    file = folder / "model.safetensors"
    weights = mx.load(str(file)) | {k.replace("__", "."): x for k, x in changed.items()}
    mx.eval(weights)
    file.unlink()
    kept = {name: x for name, x in weights.items() if x is not None}
    mx.save_safetensors(str(file), kept, {"format": "pt"})


def logits_of(source: Path | nn.Module, kind: str) -> mx.array:
    """Logits of the first draft token by another checkpoint of an assistant."""
    assistant = source if isinstance(source, nn.Module) else load_assistant(source)
    expected = golden(kind)
    target_embedding = (bound(kind), target_of(kind).embed(expected["a6_tok0"]))[1]
    shared_kv = assistant.visible(golden_kv(expected, 6))
    return assistant(target_embedding, expected["a6_hid0"], shared_kv, 6)[0]


def only_new_spelling(config: dict[str, Any]) -> None:
    del config["text_config"]["global_head_dim"]
    config["text_config"].pop("num_global_key_value_heads", None)


def only_old_spelling(config: dict[str, Any]) -> None:
    del config["text_config"]["per_layer_config"]


def unified(config: dict[str, Any]) -> None:
    config["model_type"] = "gemma4_unified_assistant"
    config["text_config"]["model_type"] = "gemma4_unified_text"


def nothing_shared_is_said(config: dict[str, Any]) -> None:
    config["text_config"]["num_kv_shared_layers"] = 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "edit", [only_new_spelling, only_old_spelling, unified, nothing_shared_is_said]
)
def test_the_configuration_may_be_spelt_in_several_ways(kind, edit, tmp_path):
    found = logits_of(edited(tmp_path, kind, edit), kind)
    assert mx.array_equal(found, logits_of(assistant_of(kind), kind))


def test_layers_are_all_of_one_size_where_the_new_spelling_says_nothing(tmp_path):
    def edit(config: dict[str, Any]) -> None:
        only_new_spelling(config)
        config["text_config"]["per_layer_config"] = None

    folder = edited(tmp_path, E4B, edit)
    prefix = "model__layers__3__self_attn__"
    sizes = {"q_proj": (64, 32), "o_proj": (32, 64), "q_norm": (16,)}
    shapes = {f"{prefix}{name}__weight": mx.ones(x) for name, x in sizes.items()}
    write_weights(folder, **shapes)
    layers = load_assistant(folder).layers
    assert {layer.self_attn.head_dim for layer in layers} == {16}


def test_sizes_of_a_centroid_head_do_not_make_one():
    config = json.loads((assistant_folder(A4B) / "config.json").read_text())
    assert config["num_centroids"] == 32
    assert "masked_embedding" not in assistant_of(A4B)
    assert assistant_of(E4B).masked_embedding.token_ordering.dtype == mx.int32


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_may_have_a_table_of_its_own(kind, tmp_path):
    folder = edited(tmp_path, kind, lambda c: c.update(tie_word_embeddings=False))
    table = mx.load(str(folder / "model.safetensors"))["model.embed_tokens.weight"]
    write_weights(
        folder, lm_head__weight=table, model__embed_tokens__weight=mx.zeros_like(table)
    )
    found = logits_of(folder, kind)
    assert mx.array_equal(found, logits_of(assistant_of(kind), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_ignores_a_second_table(kind, tmp_path):
    folder = edited(tmp_path, kind)
    write_weights(folder, lm_head__weight=mx.zeros((VOCAB_SIZE, 32)))
    found = logits_of(folder, kind)
    assert mx.array_equal(found, logits_of(assistant_of(kind), kind))


def test_a_cap_is_applied_if_the_assistant_names_one(tmp_path):
    uncapped = logits_of(assistant_of(A4B), A4B)
    folder = edited(
        tmp_path, A4B, lambda c: c["text_config"].update(final_logit_softcapping=2.0)
    )
    found = logits_of(folder, A4B)
    assert difference(found, mx.tanh(uncapped / 2) * 2) < 1e-5
    assert mx.abs(uncapped).max() > 2

    def leave_out(config: dict[str, Any]) -> None:
        del config["text_config"]["final_logit_softcapping"]

    folder = copy(assistant_folder(A4B), tmp_path / "absent", leave_out)
    assert mx.array_equal(logits_of(folder, A4B), uncapped)


@pytest.mark.parametrize("kind", KINDS)
def test_suppressed_tokens_are_never_drafted(kind, tmp_path):
    usual = logits_of(assistant_of(kind), kind)
    best = [mx.argmax(usual).item(), 7]
    folder = edited(tmp_path, kind)
    file = folder / "generation_config.json"
    file.chmod(0o644)
    file.write_text(json.dumps({"suppress_tokens": best}))
    found = logits_of(folder, kind)
    is_suppressed = mx.any(mx.arange(VOCAB_SIZE)[:, None] == mx.array(best), axis=1)
    assert mx.array_equal(found, mx.where(is_suppressed, -mx.inf, usual))


def quantise(folder: Path, kind: str, mode: str, bits: int) -> Path:
    """As mlx-lm's converter does: one rule, and layers that differ from it."""
    assistant = load_assistant(assistant_folder(kind))
    rule = {"group_size": 32, "bits": bits, "mode": mode}
    special = {"group_size": 32, "bits": 8, "mode": "affine"}
    own = {"pre_projection": special, "model.embed_tokens": special}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return own.get(path, rule)

    nn.quantize(assistant, class_predicate=choose)
    folder = edited(folder, kind, lambda c: c.update(quantization={**rule, **own}))
    (folder / "model.safetensors").unlink()
    save_model(folder, assistant)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("mxfp4", 4)])
def test_quantised_assistants_are_loaded_as_mlx_lm_loads_models(
    kind, mode, bits, tmp_path
):
    folder = quantise(tmp_path, kind, mode, bits)
    assistant = load_assistant(folder)
    assert assistant.pre_projection.bits == 8
    assert assistant.layers[0].self_attn.q_proj.bits == bits
    assert assistant.layers[0].self_attn.q_proj.mode == mode
    assert isinstance(assistant.layers[0].mlp.down_proj, nn.Linear)
    assert ("masked_embedding" in assistant) == (kind == E4B)
    if kind == E4B:
        assert assistant.masked_embedding.centroids.bits == bits
    full = load_assistant(assistant_folder(kind))
    full.load_weights(list(dequantised(assistant).items()))
    found, expected = logits_of(assistant, kind), logits_of(full, kind)
    assert mx.array_equal(mx.isfinite(found), mx.isfinite(expected))
    assert distance(found, expected) < 1e-3

    model, prompt = target_of(kind, 100), prompt_of(9)
    drafter = GemmaAssistantDrafter.from_pretrained(folder)
    options = {"drafter": drafter, "num_draft_tokens": 2}
    speculative = list(spec_generate_step(prompt, model, max_tokens=9, **options))
    assert_same_tokens(plain(model, prompt, 9), speculative)


def dequantised(assistant: nn.Module) -> dict[str, mx.array]:
    weights = dict(tree_flatten(assistant.parameters()))
    for path, module in assistant.named_modules():
        if hasattr(module, "bits"):
            names = [f"{path}.{name}" for name in ("weight", "scales", "biases")]
            arrays = [weights.pop(name, None) for name in names]
            kind = {"group_size": module.group_size, "bits": module.bits}
            weights[names[0]] = mx.dequantize(*arrays, mode=module.mode, **kind)
    return {
        name: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        for name, x in weights.items()
    }


def test_loading_draws_nothing_from_the_random_state():
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(5)
    load_drafter(E4B)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


# Errors.


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: write_weights(folder, **{name: None})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1000])


def reconfigure(edit: Edit) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("pre_projection__weight"), "pre_projection.weight"),
        (drop("masked_embedding__token_ordering"), "token_ordering"),
        (cut, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No safetensors"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json is brok",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "found list"),
        (
            reconfigure(lambda c: c.update(model_type="gemma4")),
            "is of type gemma4, exp",
        ),
        (reconfigure(lambda c: c.pop("backbone_hidden_size")), "backbone_hidden_size"),
        (reconfigure(lambda c: c.pop("text_config")), "text_config"),
        (reconfigure(lambda c: c.update(text_config=None)), "cannot be loaded"),
        (reconfigure(lambda c: c.update(backbone_hidden_size=32)), "pre_projection"),
        (reconfigure(lambda c: c.update(num_centroids=16)), "centroids"),
        (reconfigure(lambda c: c["text_config"].update(vocab_size=64)), "embed_tokens"),
    ],
)
def test_a_broken_assistant_is_one_error_that_says_where_and_what(
    spoil, message, tmp_path
):
    folder = edited(tmp_path, E4B)
    spoil(folder)
    with pytest.raises(SpeculationError, match=message) as caught:
        GemmaAssistantDrafter.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_id_is_looked_for_in_the_cache(hub_cache):
    snapshot(hub_cache, "org/tiny-assistant", assistant_folder(E4B))
    drafter = GemmaAssistantDrafter.from_pretrained("org/tiny-assistant")
    options = {"drafter": drafter, "max_tokens": 5}
    speculative = list(spec_generate_step(prompt_of(4), target_of(E4B), **options))
    assert len(speculative) == 5

    (hub_cache / "models--org--tiny-assistant" / "refs" / "main").unlink()
    folder = snapshot(hub_cache, "org/tiny-assistant", assistant_folder(E4B))
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text("nothing")
    with pytest.raises(SpeculationError, match=r"config.json is broken"):
        GemmaAssistantDrafter.from_pretrained("org/tiny-assistant")


@pytest.mark.parametrize("source", ["org/nowhere", "no/such/folder", "nowhere"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_an_error(source, hub_cache):
    with pytest.raises(
        SpeculationError, match=f"{source} is no folder here, and not on"
    ):
        GemmaAssistantDrafter.from_pretrained(source)


def test_an_assistant_needs_a_target():
    with pytest.raises(
        SpeculationError, match=r"has no model yet, expected drafter.bin"
    ):
        load_drafter(E4B).open([], 0, 0)


def wider(config: dict[str, Any]) -> None:
    config["backbone_hidden_size"] = 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_hidden_size": 128}, "expects states of size 128, the model has 64"),
        ({"vocab_size": 640}, "tokens to the number of 640, the model has 512"),
        ({"head_dim": 32}, "sliding_attention heads of size 32, the model has 16"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention heads .* None"),
    ],
)
def test_an_assistant_of_another_model_is_an_error_that_names_both(change, message):
    assistant, model = load_assistant(assistant_folder(A4B)), load_target(E4B)
    args = assistant.args
    for name, value in change.items():
        if name in args.text_config:
            args.text_config[name] = value
        else:
            setattr(args, name, value)
    if "per_layer_config" in args.text_config:
        del args.text_config["per_layer_config"]
    args.text_config["rope_parameters"]["chunked_attention"] = {"rope_theta": 1e4}
    drafter = GemmaAssistantDrafter(type(assistant)(args), "org/other-assistant")
    with pytest.raises(SpeculationError, match=message) as caught:
        list(spec_generate_step(prompt_of(4), model, drafter=drafter, max_tokens=5))
    assert "org/other-assistant" in str(caught.value)
    assert str(target_folder(E4B)) in str(caught.value)


def test_a_model_of_another_family_has_no_assistant():
    model = nn.Linear(2, 2)
    with pytest.raises(
        SpeculationError, match="only gemma4, gemma4_unified and gemma4_t"
    ):
        load_drafter(E4B).bind(model)
