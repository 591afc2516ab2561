"""Projections that are packed return what they return by themselves."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.mixins import pack_projections, packing
from tests.gemma import E4B, load_target
from tests.helpers import load_tiny

KINDS = ["dense", "dense-bf16", "dense-4bit", "moe", "moe-4bit", "gemma"]


def load(kind: str) -> nn.Module:
    return load_target(E4B) if kind == "gemma" else load_tiny(kind)


def logits(model: nn.Module, num_rows: int) -> list[mx.array]:
    cache = make_prompt_cache(model)
    tokens = mx.arange(3, 3 + 2 * num_rows).reshape(2, 1, num_rows)
    return [model(rows, cache=cache) for rows in tokens]


class Counted:
    """Counts the products that are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.number = 0
        self._original = nn.Linear.__call__
        monkeypatch.setattr(nn.Linear, "__call__", self._call())

    def _call(self) -> Any:
        def call(layer: nn.Linear, x: mx.array) -> mx.array:
            self.number += 1
            return self._original(layer, x)

        return call


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_projections_return_what_they_return_alone(
    kind: str, num_rows: int
) -> None:
    model = load(kind)
    expected = logits(model, num_rows)
    pack_projections(model)
    assert all(map(mx.array_equal, expected, logits(model, num_rows)))
    with packing():
        assert all(map(mx.array_equal, expected, logits(model, num_rows)))


def test_only_passes_that_ask_for_it_compute_fewer_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_tiny("dense")
    pack_projections(model)
    counted = Counted(monkeypatch)
    logits(model, 2)
    number, counted.number = counted.number, 0
    with packing():
        logits(model, 2)
    assert 0 < counted.number < number


def test_packing_changes_no_parameter_and_needs_no_more_memory() -> None:
    model, packed = load_tiny("dense"), load_tiny("dense")
    pack_projections(packed)
    expected = dict(tree_flatten(model.parameters()))
    found = dict(tree_flatten(packed.parameters()))
    assert expected.keys() == found.keys()
    assert all(mx.array_equal(expected[name], found[name]) for name in expected)


def test_a_weight_that_was_replaced_counts() -> None:
    model, expected = load_tiny("dense"), load_tiny("dense")
    pack_projections(model)
    for each in (model, expected):
        layer = each.layers[0].mlp.up_proj
        layer.weight = layer.weight * 2
    with packing():
        found = logits(model, 3)
    assert all(map(mx.array_equal, logits(expected, 3), found))


def test_packing_twice_and_copies_of_a_packed_model_do_no_harm() -> None:
    model = load_tiny("dense")
    expected = logits(model, 2)
    pack_projections(model)
    pack_projections(model)
    copied = copy.deepcopy(model)
    with packing():
        assert all(map(mx.array_equal, expected, logits(copied, 2)))
