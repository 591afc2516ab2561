"""Tiny models, drafters whose acceptance is known, and comparisons to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList
from mlx_lm.utils import load_model

import mlx_optiq_ext
from mlx_optiq_ext.decoding import _step
from mlx_optiq_ext.drafters import Proposal, SeparateSessions

ORACLE = Path(__file__).parent / "oracle"
DEMO = Path(mlx_optiq_ext.__file__).parent / "demo_model"

CODE = """class Queue:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
"""
CODE_AGAIN = CODE + CODE.partition("def push")[0]  # What follows can be copied.
DENSE, MOE = ORACLE / "qwen35_tiny", ORACLE / "qwen35_tiny_moe"


def load_tiny(kind: str) -> nn.Module:
    """Load a tiny Qwen3.5: dense, moe, dense-bf16, dense-4bit or moe-4bit."""
    name, _, variant = kind.partition("-")
    model, _ = load_model({"dense": DENSE, "moe": MOE}[name])
    if variant == "bf16":
        model.set_dtype(mx.bfloat16)
    elif variant == "4bit":
        nn.quantize(model, group_size=32, bits=4, class_predicate=_is_divisible)
    mx.eval(model.parameters())
    return model


def _is_divisible(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


class ScriptedDrafter:
    """A drafter that proposes the tokens of a script, or wrong ones where told to.

    Args:
        script (list[int]): The tokens that plain decoding emits.
        vocab_size (int): The size of the vocabulary.
        is_right (Callable): Whether the draft for a position of the script is right.
    """

    name = "scripted"
    reads_hidden_states = False
    computes_drafts = True

    def __init__(
        self, script: list[int], vocab_size: int, is_right: Callable[[int], bool]
    ):
        self.script = script
        self.vocab_size = vocab_size
        self.is_right = is_right

    def make_cache(self) -> list[Any]:
        return []

    def open_batch(self, batch: Any) -> SeparateSessions:
        return SeparateSessions()

    def open(self, *_: Any) -> ScriptedSession:
        return ScriptedSession(self)


class ScriptedSession:
    last_state = None
    num_put_off = 0
    entries = ()

    def __init__(self, drafter: ScriptedDrafter):
        self.drafter = drafter
        self.num_seen = 0

    def prefill(self, tokens: Any, states: Any, embeddings: Any = None) -> None:
        pass

    def draft(
        self, tokens: mx.array, states: Any, num_draft_tokens: int, proposal: Proposal
    ) -> None:
        self.num_seen += tokens.size
        for position in range(self.num_seen, self.num_seen + num_draft_tokens):
            proposal.add(self.logits(position))

    def logits(self, position: int) -> mx.array:
        drafter = self.drafter
        token = (drafter.script + [0] * 16)[position]
        if not drafter.is_right(position):
            token = (token + 1) % drafter.vocab_size
        return mx.where(mx.arange(drafter.vocab_size) == token, 30.0, 0.0)[None]

    def catch_up(self) -> None:
        pass

    def close(self, num_tokens: int, last_state: Any) -> None:
        pass


class ChangingDepth:
    """A depth that follows a pattern of parking and drafting, whatever rounds take."""

    def __init__(self, pattern: Sequence[int]):
        self.depths = itertools.cycle(pattern)

    def choose(self) -> int:
        return next(self.depths)

    def meet(self, *_: Any) -> None:
        pass

    def observe(self, *_: Any, **__: Any) -> None:
        pass


CHANGING = (0, 0, 1, 2, 0, 3, 0, 0, 0, 4, 1, 0, 1, 1)
PARKED_THEN_NOT = (*[0] * 70, 2)


def changing_depth(pattern: Sequence[int] = CHANGING) -> Any:
    """Replace the automatic depth by a pattern until the end of the context."""
    return mock.patch.object(
        _step, "make_depth", side_effect=lambda *_: ChangingDepth(pattern)
    )


def often_right(position: int) -> bool:
    """Make runs of right drafts of many lengths, with one or two misses between."""
    return (position * position + position // 3) % 7 not in (0, 4)


def contents(entry: Any) -> list[mx.array]:
    """List the arrays of a cache entry in the order in which it has them."""
    if isinstance(entry, CacheList):
        return [array for inner in entry.caches for array in contents(inner)]
    if hasattr(entry, "keys_and_values"):
        return [array for _, array in tree_flatten(entry.keys_and_values())]
    return list(entry.cache)


def assert_same_cache(expected: list[Any], found: list[Any]) -> None:
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert type(one) is type(other)
        for name in ("offset", "_idx", "group_size", "bits", "start_position"):
            assert getattr(one, name, None) == getattr(other, name, None), name
        pairs = zip(contents(one), contents(other), strict=True)
        assert all(mx.array_equal(a, b).item() for a, b in pairs), f"entry {index}"


def assert_same_tokens(plain: list[Any], speculative: list[Any]) -> None:
    """Check that tokens and log probabilities are equal to the bit."""
    assert [token for token, *_ in plain] == [token for token, *_ in speculative]
    for (_, expected, *_), (_, found, *_) in zip(plain, speculative, strict=True):
        assert expected.shape == found.shape
        assert expected.dtype == found.dtype
        assert mx.array_equal(expected, found).item()
