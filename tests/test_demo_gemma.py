"""The embedded Gemma-4 model and its assistant are small, whole and of use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import mlx_optiq_ext
from mlx_optiq_ext.assistants import load_assistant
from mlx_optiq_ext.drafters import GemmaAssistantDrafter
from mlx_optiq_ext.mixins.gemma4 import attach_shared_kv
from tests.test_demo_model import SAMPLE, TEXTS

DEMO = Path(mlx_optiq_ext.__file__).parent / "demo_gemma"
ASSISTANT = DEMO / "assistant"
WINDOW = 128

MAX_SIZE = 12e6
MIN_ACCEPTANCE = 0.4
MIN_AGREEMENT = 0.6
NUM_TOKENS = 64
# Lengths of prompts: the text stays inside the window, crosses it, is past it.
NUM_PROMPT_TOKENS = {"inside": 40, "across": 100, "past": 300}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return mlx_lm.load(str(DEMO))


@pytest.fixture(scope="module")
def sample(loaded: tuple[Any, Any]) -> list[int]:
    return loaded[1].encode(SAMPLE.read_text())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_cut_the_same_whichever_way_the_tokenizer_is_loaded(
    text: str, loaded: tuple[Any, Any]
) -> None:
    from_file = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    expected = from_file.encode(text).ids
    assert AutoTokenizer.from_pretrained(DEMO).encode(text) == expected
    assert loaded[1].encode(text) == expected


def test_both_models_together_fit_into_the_wheel() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_SIZE


def test_plain_mlx_lm_loads_and_generates_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = mlx_lm.load(str(DEMO))
        text = mlx_lm.generate(model, tokenizer, "import os\n", max_tokens=8)
    assert text
    assert tokenizer.eos_token_ids == {0, 2}


def test_no_tensor_is_missing_and_none_is_left_over() -> None:
    model, _ = load_model(DEMO, strict=True)
    for folder, each in ((DEMO, model), (ASSISTANT, load_assistant(ASSISTANT))):
        stored = mx.load(str(folder / "model.safetensors"))
        assert len(stored) == len(tree_flatten(each.parameters()))
        assert {x.dtype for x in stored.values()} == {mx.float32}


def test_layers_are_of_both_types_and_share_keys_and_values() -> None:
    model, _ = load_model(DEMO)
    attach_shared_kv(model)
    assert model.donors == {"full_attention": 5, "sliding_attention": 6}
    assert len(model.layers) == 12
    assert len(model.make_cache()) == 7
    kinds = {layer.layer_type for layer in load_assistant(ASSISTANT).layers}
    assert kinds == set(model.donors)


def test_assistant_agrees_with_the_model_on_text_that_neither_has_seen(
    sample: list[int],
) -> None:
    model, _ = load_model(DEMO)
    attach_shared_kv(model)
    assistant = load_assistant(ASSISTANT)
    tokens = mx.array([sample])[:, :400]
    # A cache that has seen everything in one pass still has all of it.
    cache = model.make_cache()
    states = model.hidden_states(tokens, cache)
    choices = model.project(states).argmax(-1)
    shared_kv = model.shared_kv(cache)

    def agreement(states: mx.array) -> float:
        drafts = []
        for position in range(1, tokens.shape[1]):
            visible = assistant.visible(
                {
                    k: tuple(x[:, :, :position] for x in kv)
                    for k, kv in shared_kv.items()
                }
            )
            embedding = model.embed(tokens[:, position : position + 1])
            state = states[:, position - 1 : position]
            logits, _ = assistant(embedding, state, visible, position)
            drafts.append(logits.argmax(-1))
        return (mx.concatenate(drafts, axis=1) == choices[:, 1:]).mean().item()

    assert agreement(states) >= MIN_AGREEMENT
    assert agreement(mx.zeros_like(states)) < MIN_AGREEMENT - 0.15


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize(
    "num_prompt_tokens", NUM_PROMPT_TOKENS.values(), ids=NUM_PROMPT_TOKENS
)
def test_drafts_are_accepted_and_the_tokens_are_those_of_plain_decoding(
    num_prompt_tokens: int,
    num_draft_tokens: int,
    loaded: tuple[Any, Any],
    sample: list[int],
) -> None:
    model, tokenizer = loaded
    prompt = sample[:num_prompt_tokens]
    options = {
        "draft": GemmaAssistantDrafter.from_pretrained(ASSISTANT),
        "num_draft_tokens": num_draft_tokens,
    }
    plain, speculative = (
        list(
            mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=NUM_TOKENS, **each
            )
        )
        for each in ({}, options)
    )
    assert [r.token for r in speculative] == [r.token for r in plain]
    stats = speculative[-1].speculation
    assert stats.acceptance_rate_per_position[0] >= MIN_ACCEPTANCE


def test_prompts_are_on_both_sides_of_the_window(loaded: tuple[Any, Any]) -> None:
    inside, across, past = NUM_PROMPT_TOKENS.values()
    assert loaded[0].language_model.args.sliding_window == WINDOW
    assert inside + NUM_TOKENS < WINDOW < across + NUM_TOKENS
    assert across < WINDOW < past


@pytest.mark.parametrize(
    "request_",
    ["def get_name(self) -> str:", "How do I write `def __len__(self)` in Python?"],
)
@pytest.mark.parametrize("system", [None, "Write Python code."])
def test_chat_answer_is_a_function_and_ends(
    request_: str, system: str | None, loaded: tuple[Any, Any]
) -> None:
    model, tokenizer = loaded
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": request_})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = list(
        mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=200, draft=ASSISTANT
        )
    )
    text = "".join(response.text for response in responses)
    assert text.startswith("def ")
    assert responses[-1].finish_reason == "stop"
    assert tokenizer.decode([responses[-1].token]) == "<|im_end|>"
