"""Layers that keep their states after every row, and what is taken back of them.

The kernel needs an NVIDIA GPU. Elsewhere mlx-lm's operations stand in for it, so that
all but the kernel itself is what runs there.
"""

from __future__ import annotations

from typing import Any

import check_recurrence
import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import spec_generate_step
from mlx_optiq_ext.drafters import MTPDrafter
from mlx_optiq_ext.mixins import attach_mtp
from mlx_optiq_ext.rollback import (
    MAX_ROWS,
    Batch,
    RowStates,
    Tape,
    Transaction,
    _recurrence,
    _rows,
    can_keep_rows,
    prepare_recurrence,
)
from tests.helpers import assert_same_cache, load_tiny
from tests.rollback.test_batch import Company

KINDS = ["dense", "dense-bf16", "dense-4bit", "moe"]


class StandIn:
    """mlx-lm's operations in place of the kernel, with the passes that they took."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def __call__(self, layer: Any, mixed: mx.array, *rest: Any) -> Any:
        self.num_rows.append(mixed.shape[1])
        return check_recurrence.mix_by_operations(layer, mixed, *rest)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for module in (_rows, _recurrence):
        monkeypatch.setattr(module, "can_keep_rows", lambda: True)
    monkeypatch.setattr(_rows, "mix_rows", stand_in)
    monkeypatch.setattr(_rows, "LANES", 16)  # The tiny models have heads of 16.
    return stand_in


@pytest.mark.skipif(not can_keep_rows(), reason="The kernel needs an NVIDIA GPU.")
def test_the_kernel_computes_what_mlx_lm_computes() -> None:
    assert not [result for result in check_recurrence.results() if not result.is_right]


@pytest.mark.parametrize("num_rows", [1, 2, 5, MAX_ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_after_the_rows_kept(
    kernel: StandIn, kind: str, num_rows: int
) -> None:
    model = load_tiny(kind)
    prepare_recurrence(model)
    tokens = mx.arange(1, 9 + num_rows)
    for num_kept in range(num_rows + 1):
        cache, expected = make_prompt_cache(model), make_prompt_cache(model)
        model(tokens[None, :8], cache=cache)
        model(tokens[None, :8], cache=expected)
        transaction = Transaction(cache, Tape())
        transaction.run(
            lambda entries, number: model(tokens[None, 8 : 8 + number], entries),
            num_rows,
        )
        transaction.keep(num_kept)
        transaction.settle()
        for position in range(8, 8 + num_kept):
            model(tokens[None, position : position + 1], cache=expected)
        assert_same_cache(expected, cache)
    assert set(kernel.num_rows) == {num_rows}


@pytest.mark.parametrize("name", ["qwen dense", "qwen moe", "qwen bfloat16"])
def test_each_sequence_of_a_batch_keeps_rows_of_its_own(
    kernel: StandIn, name: str
) -> None:
    company = Company(name)
    company.live()
    assert len(kernel.num_rows) > 14


def test_what_a_pass_keeps_is_named_by_an_index(
    kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = Company("qwen dense")
    for num_prompt_tokens in (3, 5):
        company.join(num_prompt_tokens)
    company.round(is_known=False)
    starts = []
    take, stand_in = RowStates.taken, check_recurrence.mix_by_operations
    monkeypatch.setattr(RowStates, "taken", None)

    def mix(layer: Any, mixed: mx.array, a: Any, b: Any, before: RowStates) -> Any:
        starts.append(before.kept)
        with monkeypatch.context() as patch:
            patch.setattr(RowStates, "taken", take)
            return stand_in(layer, mixed, a, b, before)

    monkeypatch.setattr(_rows, "mix_rows", mix)
    rows = [member.tokens(2) for member in company.members]
    company.forward(mx.stack(rows))
    assert len({id(kept) for kept in starts}) == 1


@pytest.mark.parametrize("is_wide", [False, True])
def test_a_pass_that_the_kernel_does_not_know_goes_on_from_its_states(
    kernel: StandIn, is_wide: bool
) -> None:
    company = Company("qwen dense")
    for num_prompt_tokens in (3, 5):
        company.join(num_prompt_tokens)
    company.round()
    before = len(kernel.num_rows)
    if is_wide:
        rows = [member.tokens(MAX_ROWS + 3) for member in company.members]
        company.forward(mx.stack(rows))
        for member, tokens in zip(company.members, rows, strict=True):
            member.feed(tokens)
        company.batch.keep([MAX_ROWS + 3] * 2)
    else:
        company.model.train()
        company.round()
        company.model.eval()
    assert len(kernel.num_rows) == before
    company.round()
    assert len(kernel.num_rows) > before
    for index in range(2):
        company.check(index)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_decoding_gives_the_tokens_and_the_cache_of_plain_decoding(
    kernel: StandIn, num_draft_tokens: int
) -> None:
    plain_model, model = load_tiny("dense"), load_tiny("dense")
    attach_mtp(model)
    prompt = mx.arange(3, 40)
    own, expected = make_prompt_cache(model), make_prompt_cache(plain_model)
    steps = spec_generate_step(
        prompt,
        model,
        drafter=MTPDrafter(model),
        num_draft_tokens=num_draft_tokens,
        max_tokens=40,
        prompt_cache=own,
    )
    found = [(token, logprobs) for token, logprobs, _ in steps]
    plain = list(
        generate_step(prompt, plain_model, max_tokens=40, prompt_cache=expected)
    )
    assert [token for token, _ in found] == [token for token, _ in plain]
    for (_, one), (_, other) in zip(found, plain, strict=True):
        assert mx.array_equal(one, other)
    assert_same_cache(expected, own[: len(expected)])
    assert 1 + num_draft_tokens in kernel.num_rows


def test_plain_decoding_stays_with_mlx_lm(kernel: StandIn) -> None:
    model = load_tiny("dense")
    prepare_recurrence(model)
    assert list(generate_step(mx.arange(3, 9), model, max_tokens=3))
    assert kernel.num_rows == []


def test_without_a_kernel_layers_stay_as_they_are() -> None:
    if can_keep_rows():
        pytest.skip("There is a kernel.")
    model = load_tiny("dense")
    Batch(model)
    layers = [layer.linear_attn for layer in model.layers if layer.is_linear]
    assert {type(layer) for layer in layers} == {_rows.GatedDeltaNet}
