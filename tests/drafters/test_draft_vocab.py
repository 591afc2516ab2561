"""A head that proposes only some of the tokens leaves the output as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import SpeculationError, SpeculationStats, spec_generate_step
from mlx_optiq_ext.drafters import (
    Drafter,
    DraftModelDrafter,
    DraftSession,
    MTPDrafter,
    limit_drafts,
)
from mlx_optiq_ext.drafters._draft_vocab import (
    SubsetProjection,
    choose_tokens,
    read_token_ids,
)
from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from tests.decoding.test_acceptance import TOLERATED_P_VALUE, exact, p_value
from tests.helpers import DEMO, assert_same_cache, assert_same_tokens, load_tiny

PROMPT = mx.arange(3, 20)
VOCAB_SIZE = 64
TOKENS = [1, 2, 5, 17, 40, 63]


def test_tokens_are_added_ones_then_the_prompts_then_the_lowest() -> None:
    assert choose_tokens(4, [], []) == [0, 1, 2, 3]
    assert choose_tokens(4, [], [90, 1]) == [0, 1, 2, 90]
    assert choose_tokens(5, [7, 8, 8, 9, 9, 9], [90]) == [0, 7, 8, 9, 90]
    assert choose_tokens(3, [7, 8, 8, 9, 9, 9], [90]) == [8, 9, 90]
    assert choose_tokens(1, [7], [90, 91]) == [90]


@pytest.mark.parametrize(
    "text", ["7\n3\n\n3\n12\n", "7 3 12", "[7, 3, 12]", '\n ["7", 3, 12]']
)
def test_a_file_has_ids_one_a_line_or_as_a_list(text: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(text)
    assert read_token_ids(tmp_path / "ids", 13) == [3, 7, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7\n13\n", "'13' is none of the 13 tokens"),
        ("[-1]", "-1 is none of the 13"),
        ("[true]", "True is none"),
        ("[1.5]", "1.5 is none"),
        ("the\n", "'the'"),
        ("[1,", "no file of token ids"),
        ('{"a": 1}', "no file of token ids"),
        ("\n", "it has none"),
    ],
)
def test_any_other_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(SpeculationError, match=r"Cannot speculate: .*ids") as found:
        read_token_ids(tmp_path / "ids", 13)
    assert message in str(found.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpeculationError, match="gone is no file of token ids"):
        read_token_ids(tmp_path / "gone", 13)


def layers_of(kind: str) -> nn.Module:
    layer = (nn.Linear if "linear" in kind else nn.Embedding)(
        *((64, VOCAB_SIZE) if "linear" in kind else (VOCAB_SIZE, 64))
    )
    layer.set_dtype(mx.bfloat16 if "bf16" in kind else mx.float32)
    if "mxfp4" in kind:
        return layer.to_quantized(mode="mxfp4")
    if "bits" in kind:
        return layer.to_quantized(group_size=32, bits=int(kind.split()[0]))
    return layer


@pytest.mark.parametrize(
    "kind",
    [
        "embedding",
        "bf16 embedding",
        "4 bits embedding",
        "mxfp4 embedding",
        "linear",
        "8 bits linear",
        "3 bits linear",
        "mxfp4 linear",
    ],
)
def test_rows_of_a_layer_give_what_the_layer_gives(kind: str) -> None:
    layer = layers_of(kind)
    before = {name: x + 0 for name, x in layer.parameters().items()}
    hidden = mx.random.normal((1, 1, 64), key=mx.random.key(1))
    hidden = hidden.astype(mx.bfloat16 if "bf16" in kind else mx.float32)
    whole = (getattr(layer, "as_linear", None) or layer)(hidden)
    found = SubsetProjection(layer, TOKENS)(hidden)
    assert (found.shape, found.dtype) == (whole.shape, whole.dtype)
    assert mx.array_equal(found[..., mx.array(TOKENS)], whole[..., mx.array(TOKENS)])
    others = [token for token in range(VOCAB_SIZE) if token not in TOKENS]
    assert (found[..., mx.array(others)] == -mx.inf).all()
    assert all(mx.array_equal(layer[name], x).item() for name, x in before.items())


@pytest.fixture(scope="module")
def demo() -> Any:
    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model)
    return model, mx.array(tokenizer.encode("class Queue:\n    def __init__("))


@pytest.mark.parametrize("kind", ["dense", "moe", "dense-4bit", "dense-bf16"])
@pytest.mark.parametrize("num_tokens", [1, 64, 10_000])
def test_greedy_output_is_the_same_to_the_bit(kind: str, num_tokens: int) -> None:
    model = load_tiny(kind)
    plain_cache, own_cache = make_prompt_cache(model), make_prompt_cache(model)
    arguments = {"max_tokens": 40, "prefill_step_size": 5}
    plain = generate_step(PROMPT, model, prompt_cache=plain_cache, **arguments)
    speculative = spec_generate_step(
        PROMPT,
        model,
        prompt_cache=own_cache,
        draft_vocab=num_tokens,
        num_draft_tokens=3,
        **arguments,
    )
    assert_same_tokens(list(plain), list(speculative))
    assert_same_cache(plain_cache, own_cache[: len(plain_cache)])


def test_processors_see_and_shape_what_is_proposed(demo: Any) -> None:
    model, prompt = demo
    options = {"max_tokens": 60}
    processors = {"logit_bias": {70: 2.0, 2000: 9.0}, "repetition_penalty": 1.2}
    plain, speculative = (
        list(
            step(
                prompt,
                model,
                logits_processors=make_logits_processors(**processors),
                **options,
                **more,
            )
        )
        for step, more in (
            (generate_step, {}),
            (spec_generate_step, {"draft_vocab": 512, "num_draft_tokens": 2}),
        )
    )
    assert_same_tokens(plain, speculative)


def rates(demo: Any, **options: Any) -> SpeculationStats:
    model, prompt = demo
    stats = SpeculationStats()
    list(
        spec_generate_step(
            prompt, model, num_draft_tokens=1, max_tokens=100, stats=stats, **options
        )
    )
    return stats


def test_only_tokens_that_were_chosen_are_proposed(demo: Any, tmp_path: Path) -> None:
    model, prompt = demo
    (tmp_path / "ids.json").write_text(json.dumps(TOKENS))
    steps = spec_generate_step(
        prompt,
        model,
        num_draft_tokens=1,
        max_tokens=100,
        draft_vocab=tmp_path / "ids.json",
    )
    drafted = {token for token, _, is_draft in steps if is_draft}
    assert drafted <= set(TOKENS)
    everything = [token for token, _ in generate_step(prompt, model, max_tokens=100)]
    (tmp_path / "ids").write_text("\n".join(map(str, everything)))
    assert (
        rates(demo, draft_vocab=tmp_path / "ids").num_accepted
        >= rates(demo).num_accepted
    )


def test_acceptance_falls_with_the_number_of_tokens(demo: Any) -> None:
    all_, half, few = (
        rates(demo, draft_vocab=num_tokens).acceptance_rate
        for num_tokens in (2048, 1024, 128)
    )
    assert all_ == rates(demo).acceptance_rate
    assert all_ - 0.1 < half
    assert few < half - 0.2


def test_tokens_of_the_prompt_are_proposed(demo: Any) -> None:
    """Also of a prompt that the session was not shown, as in a batch."""
    model, prompt = demo
    drafter = MTPDrafter(model, 24)
    session = drafter.open(make_prompt_cache(model), 8, 0)
    session.prefill(prompt, mx.zeros((1, len(prompt), 128)))
    resumed = drafter.open(make_prompt_cache(model), 8, 0, prompt.tolist())
    resumed.prefill(prompt[-1:], mx.zeros((1, 1, 128)))
    for seen in (session, resumed):
        logits = seen._project(mx.zeros((1, 1, 128)))[0, 0]
        proposed = set(np.flatnonzero(np.array(logits) > -np.inf).tolist())
        assert len(proposed) == 24
        # Of the demo's tokenizer, 0 to 2 are special.
        assert set(prompt.tolist()) | {0, 1, 2} <= proposed


@pytest.mark.parametrize(
    "settings", [{"temp": 1.0, "top_p": 0.9}, {"temp": 0.8, "min_p": 0.05}]
)
def test_sampled_tokens_have_the_distribution_of_the_sampler(
    settings: dict[str, float],
) -> None:
    """Of a model whose state is the last token, so that every row is known."""
    mx.random.seed(31)
    model = MarkovTarget()
    stats = SpeculationStats()
    steps = spec_generate_step(
        mx.array([0]),
        model,
        drafter=MarkovHead(model, kept=[0, 1, 3, 4, 7, 8]),
        num_draft_tokens=2,
        max_tokens=2_500,
        sampler=make_sampler(**settings),
        stats=stats,
    )
    tokens = np.array([0] + [token for token, *_ in steps])
    assert 0.2 < stats.acceptance_rate < 0.8
    for last in range(12):
        following = tokens[1:][tokens[:-1] == last]
        if len(following) > 100:
            expected = exact(model.rows.weight[:, last][None], settings)
            assert p_value(mx.array(following), expected) > TOLERATED_P_VALUE


class MarkovTarget(nn.Module):
    """A model whose next token depends on the last one alone, by its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(12, 12, bias=False)
        self.rows.weight = 1.5 * mx.random.normal((12, 12), key=mx.random.key(5))
        self.layers: list[nn.Module] = []

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.rows(one_hot(inputs))


def one_hot(tokens: mx.array) -> mx.array:
    return (tokens[..., None] == mx.arange(12)).astype(mx.float32)


class MarkovHead(Drafter, DraftSession):
    """Drafts with some of the rows of the output layer, as an MTP head does."""

    name = "markov"
    reads_hidden_states = False

    def __init__(self, model: MarkovTarget, kept: list[int]):
        self.project = SubsetProjection(model.rows, kept)

    def open(self, *_: Any) -> MarkovHead:
        return self

    def prefill(self, *_: Any) -> None: ...

    def draft(
        self, tokens: mx.array, states: Any, num_draft_tokens: int, proposal: Any
    ) -> None:
        for last in range(num_draft_tokens):
            token = proposal.tokens[-1] if last else tokens[-1:]
            proposal.add(self.project(one_hot(token)[None])[:, -1])


def test_only_an_mtp_head_can_be_limited() -> None:
    drafter = DraftModelDrafter(load_tiny("dense"))
    assert limit_drafts(drafter, None) is drafter
    with pytest.raises(SpeculationError, match=r"for MTP heads, .* DraftModelDrafter"):
        limit_drafts(drafter, 64)


@pytest.mark.parametrize("draft_vocab", [0, -1, 1.5, True, "", [1, 2]])
def test_what_is_neither_a_number_nor_a_path_is_refused(draft_vocab: Any) -> None:
    with pytest.raises(ValueError, match="positive whole number or a file"):
        next(spec_generate_step(PROMPT, load_tiny("dense"), draft_vocab=draft_vocab))


def test_a_layer_without_rows_to_take_is_refused() -> None:
    model = load_tiny("dense")
    attach_mtp(model)
    text = model.language_model
    name = "lm_head" if "lm_head" in text else "embed_tokens"
    owner = text if name == "lm_head" else text.model
    setattr(owner, name, type("Adapted", (type(owner[name]),), {})(8, 8))
    with pytest.raises(SpeculationError, match="output layer is a Adapted"):
        MTPDrafter(model, 4)


def test_rows_are_copied_once_for_all_generations(demo: Any) -> None:
    model, _ = demo
    first, second = (MTPDrafter(model, 64)._vocabulary for _ in range(2))
    assert first is second
    projections = [first.projection(tokens) for tokens in ([3, 700], [900, 901, 3])]
    assert projections[0]._parts[0] is projections[1]._parts[0]
    # What is copied for a sequence is no more than its prompt has beside those.
    added = [projection._parts[1].tokens.tolist() for projection in projections]
    assert added == [[700], [900, 901]]
    hidden = mx.random.normal((1, 1, 128), key=mx.random.key(2))
    whole = model.project(hidden)
    for projection in projections:
        logits = projection(hidden)
        kept = mx.array(projection.tokens)
        assert kept.size == 64
        assert mx.array_equal(logits[..., kept], whole[..., kept]).item()
        assert mx.sum(logits > -mx.inf).item() == 64
    assert MTPDrafter(model, 65)._vocabulary is not first
