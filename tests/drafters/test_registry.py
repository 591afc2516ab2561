"""A drafter is found by the type of its checkpoint, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler

from mlx_optiq_ext import SpeculationError, SpeculationStats, spec_generate_step
from mlx_optiq_ext.decoding._rows import Proposal, Verifier
from mlx_optiq_ext.drafters import (
    REGISTRY,
    Drafter,
    DraftModelDrafter,
    DraftSession,
    GemmaAssistantDrafter,
    MTPDrafter,
    as_drafter,
    is_draft_model,
)
from tests.gemma import (
    A4B,
    E4B,
    VOCAB_SIZE,
    add_tokenizer,
    assistant_folder,
    copy,
    load_target,
    target_folder,
)
from tests.heads.variants import oracle, prefixed, write
from tests.helpers import DENSE, assert_same_tokens, load_tiny

PROMPT = mx.array([5, 9, 3, 3])


def head_config(model_type: str) -> dict[str, Any]:
    config, *_ = oracle(DENSE.name)
    return {"model_type": model_type, "text_config": config["text_config"]}


@pytest.mark.parametrize("model_type", ["qwen3_5_mtp", "qwen3_5_moe_mtp"])
def test_a_head_stored_by_itself_is_recognised(model_type, tmp_path):
    *_, head = oracle(DENSE.name)
    folder = tmp_path / "head"
    write(folder, head_config(model_type), {"model.safetensors": prefixed(head)})
    write(tmp_path, None, {"mtp.safetensors": prefixed(head)})
    model = load_tiny("dense")
    expected = list(generate_step(PROMPT, model, max_tokens=6))
    for source in (folder, str(folder), tmp_path / "mtp.safetensors"):
        assert not is_draft_model(source)
        drafter = as_drafter(source, model)
        assert isinstance(drafter, MTPDrafter)
        assert model.mtp is as_drafter(source, model)._model.mtp
    found = list(spec_generate_step(PROMPT, model, drafter=drafter, max_tokens=6))
    assert_same_tokens(expected, found)


@pytest.mark.parametrize("model_type", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_an_assistant_is_recognised_and_loaded_once(model_type, tmp_path):
    folder = copy(
        assistant_folder(E4B),
        tmp_path / "assistant",
        lambda config: config.update(model_type=model_type),
    )
    model = load_target(E4B)
    before = [name for name, _ in tree_flatten(model.parameters())]
    assert not is_draft_model(folder)
    drafter = as_drafter(str(folder), model)
    assert isinstance(drafter, GemmaAssistantDrafter)
    shutil.rmtree(folder)
    assert as_drafter(str(folder), model)._assistant is drafter._assistant
    with pytest.raises(SpeculationError, match="is no folder here"):
        as_drafter(str(folder), load_target(E4B))
    assert [name for name, _ in tree_flatten(model.parameters())] == before


def test_another_path_loads_another_drafter(tmp_path):
    model = load_target(E4B)
    first = as_drafter(assistant_folder(E4B), model)
    again = as_drafter(str(assistant_folder(E4B)), model)
    assert again._assistant is first._assistant
    other = copy(assistant_folder(E4B), tmp_path / "other")
    assert as_drafter(other, model)._assistant is not first._assistant
    with pytest.raises(SpeculationError):
        as_drafter("no/such/thing", model)
    assert as_drafter(other, model)._assistant is not first._assistant


def test_anything_else_is_an_ordinary_draft_model(tmp_path):
    folder = add_tokenizer(copy(target_folder(A4B), tmp_path / "model"))
    model = load_target(E4B, sliding_window=50)
    expected = list(generate_step(PROMPT, model, max_tokens=6))
    assert is_draft_model(folder)
    assert is_draft_model(DENSE)
    assert is_draft_model("no/such/thing")
    assert is_draft_model(tmp_path)
    drafter = as_drafter(folder, model)
    assert isinstance(drafter, DraftModelDrafter)
    assert as_drafter(folder, model)._model is drafter._model
    assert list(model) == ["model"]
    found = list(spec_generate_step(PROMPT, model, drafter=drafter, max_tokens=6))
    assert_same_tokens(expected, found)


def test_drafters_and_models_are_taken_as_they_are():
    model, target = load_target(A4B), load_target(E4B)
    drafter = as_drafter(model, target)
    assert isinstance(drafter, DraftModelDrafter)
    assert as_drafter(drafter, target) is drafter


@pytest.mark.parametrize("value", [7, "", True, ["x"], object])
def test_what_cannot_draft_is_named(value):
    with pytest.raises(ValueError, match="draft must be a drafter, a model or a path,"):
        as_drafter(value, load_target(E4B), argument="draft")


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 100, VOCAB_SIZE + 100])
@pytest.mark.parametrize("temp", [0, 1.0])
def test_tables_of_a_draft_model_may_be_padded_otherwise(vocab_size, temp):
    target = load_target(E4B, sliding_window=50)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 1, "vocab_size": vocab_size}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs("llama", rms_norm_eps=1e-6, **sizes))
    if vocab_size > VOCAB_SIZE:
        # The model's favourites are tokens that the target does not have.
        model.lm_head = PreferLast(model.model.embed_tokens)
    stats, sampler = SpeculationStats(), make_sampler(temp=temp)
    found = list(
        spec_generate_step(
            PROMPT,
            target,
            drafter=model,
            num_draft_tokens=2,
            max_tokens=9,
            sampler=sampler,
            stats=stats,
        )
    )
    assert max(token for token, *_ in found) < VOCAB_SIZE
    assert stats.num_drafted > 5
    if temp == 0:
        assert_same_tokens(list(generate_step(PROMPT, target, max_tokens=9)), found)


def test_tokens_that_a_draft_model_lacks_are_not_drafted():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 1, "vocab_size": 100}
    model = llama.Model(llama.ModelArgs("llama", rms_norm_eps=1e-6, **sizes))
    session = DraftModelDrafter(model).open([], 0, 0)
    proposal = Proposal(Verifier(), None)
    session.draft(mx.array([5]), mx.zeros((1, 1, VOCAB_SIZE)), 1, proposal)
    assert proposal.tokens[0].item() < 100
    session.draft(mx.array([6]), mx.zeros((1, 1, 50)), 1, proposal)
    assert proposal.tokens[1].item() < 50


class PreferLast(nn.Module):
    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table

    def __call__(self, x: mx.array) -> mx.array:
        return self.table.as_linear(x) + mx.arange(self.table.weight.shape[0])


# A drafter of the reader's own. README shows this class and the line that names it.


class RepeatDrafter(Drafter, DraftSession):
    """Proposes what followed the last token where it last occurred."""

    name = "repeat"
    reads_hidden_states = False

    def __init__(self, source):
        self.num_tokens = json.loads((Path(source) / "config.json").read_text())[
            "memory"
        ]

    def open(self, prompt_cache, num_target_entries, num_tokens, tokens=()):
        self.seen = []
        return self

    def prefill(self, tokens, states, embeddings=None):
        self.seen += tokens.tolist()

    def draft(self, tokens, states, num_draft_tokens, proposal):
        self.prefill(tokens, states)
        memory = self.seen[-self.num_tokens :]
        for _ in range(num_draft_tokens):
            earlier = [i for i, token in enumerate(memory[:-1]) if token == memory[-1]]
            memory.append(memory[earlier[-1] + 1] if earlier else memory[-1])
            proposal.add((mx.arange(proposal.vocab_size) == memory[-1])[None] * 9.0)


def test_a_drafter_is_added_with_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "repeat", RepeatDrafter)
    (tmp_path / "config.json").write_text('{"model_type": "repeat", "memory": 64}')
    model, stats = load_tiny("dense"), SpeculationStats()
    expected = list(generate_step(PROMPT, model, max_tokens=40))
    drafter = as_drafter(tmp_path, model)
    assert isinstance(drafter, RepeatDrafter)
    options = {"drafter": drafter, "num_draft_tokens": 2, "stats": stats}
    found = list(spec_generate_step(PROMPT, model, max_tokens=40, **options))
    assert_same_tokens(expected, found)
    assert stats.num_drafted > 20
