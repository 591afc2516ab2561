"""What is drafted for several sequences at once is what is drafted for each alone."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.drafters import Committed, Drafter, MTPDrafter
from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from mlx_optiq_ext.rollback import Batch
from tests.gemma import A4B, E4B, load_drafter, load_target
from tests.helpers import assert_same_cache, load_tiny

NUM_TOKENS = 200  # that every model has


def make_mtp() -> tuple[nn.Module, Drafter]:
    model = load_tiny("dense")
    attach_mtp(model)
    return model, MTPDrafter(model)


def make_assistant(kind: str, window: int = 8) -> tuple[nn.Module, Drafter]:
    model = load_target(kind, sliding_window=window)
    return model, load_drafter(kind).bind(model)


DRAFTERS = {
    "mtp": make_mtp,
    "assistant, per-layer inputs": lambda: make_assistant(E4B),
    "assistant, experts": lambda: make_assistant(A4B),
    "assistant, a window that is long": lambda: make_assistant(E4B, 64),
}


class Drafts:
    """Takes the most probable token of every row, and keeps the logits."""

    vocab_size = None

    def __init__(self) -> None:
        self.logits: list[mx.array] = []
        self.tokens: list[mx.array] = []

    @property
    def latest(self) -> mx.array:
        return self.tokens[-1][:, None]

    def add(self, logits: mx.array) -> None:
        self.logits.append(logits)
        self.tokens.append(mx.argmax(logits, axis=-1).astype(mx.uint32))


class Member:
    """A sequence with its cache and with the session of a drafter."""

    def __init__(self, model: Any, drafter: Drafter, prompt: list[int]):
        self.model, self.tokens = model, list(prompt)
        self.cache = make_prompt_cache(model)
        self.num_entries = len(self.cache)
        self.session = drafter.open(self.cache, self.num_entries, 0)
        # mlx-lm feeds the last token of a prompt by itself.
        for tokens in filter(None, (prompt[:-1], prompt[-1:])):
            self.session.prefill(mx.array(tokens), self.feed(tokens))

    def feed(self, tokens: list[int]) -> mx.array:
        cache = self.cache[: self.num_entries]
        return self.model.hidden_states(mx.array([tokens]), cache=cache)

    def draft(self, tokens: list[int], states: mx.array, number: int) -> Drafts:
        drafts = Drafts()
        self.session.draft(mx.array(tokens), states, number, drafts)
        return drafts


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_in_company_are_those_of_each_sequence_alone(name: str) -> None:
    model, drafter = DRAFTERS[name]()
    chance = random.Random(1)
    prompts = [
        [chance.randrange(NUM_TOKENS) for _ in range(number)] for number in (1, 30, 7)
    ]
    alone, together = (
        [Member(model, drafter, prompt) for prompt in prompts] for _ in "ab"
    )
    batch = Batch(model)
    session = drafter.open_batch(batch)
    for each in together:
        batch.join(each.cache[: each.num_entries])
        session.join(each.session)
    states = mx.concatenate([each.feed([5])[:, -1:] for each in alone])
    batch.run(lambda entries, _: feed(model, [[5]] * 3, entries), 1)
    tokens, num_rows = [[6]] * 3, [1] * 3
    for _ in range(6):
        number = chance.randint(1, 3)
        found = Drafts()
        committed = Committed(padded(tokens), states, num_rows)
        session.draft(committed, [number] * 3, found)
        for index, each in enumerate(alone):
            rows = states[index : index + 1, : num_rows[index]]
            expected = each.draft(tokens[index], rows, number)
            for row, logits in zip(expected.logits, found.logits, strict=True):
                assert mx.array_equal(row[0], logits[index]), (index, number)
        # Next, every sequence has some rows of a pass that emits other tokens.
        num_rows = [chance.randint(1, 4) for _ in prompts]
        width = max(num_rows)
        last = [each[-1] for each in tokens]
        fed = [[x, *[chance.randrange(NUM_TOKENS)] * (width - 1)] for x in last]
        states = batch.run(lambda entries, _, fed=fed: feed(model, fed, entries), width)
        batch.keep(num_rows)
        for each, row, kept in zip(alone, fed, num_rows, strict=True):
            for token in row[:kept]:
                each.feed([token])
        tokens = [
            [*row[1:kept], chance.randrange(NUM_TOKENS)]
            for row, kept in zip(fed, num_rows, strict=True)
        ]


def feed(model: Any, tokens: list[list[int]], entries: list[Any]) -> mx.array:
    return model.hidden_states(mx.array(tokens), cache=entries)


def padded(tokens: list[list[int]]) -> mx.array:
    width = max(map(len, tokens))
    return mx.array([[*row, *[0] * (width - len(row))] for row in tokens], mx.uint32)


def test_what_was_put_off_is_seen_in_order_and_in_one_run() -> None:
    model, drafter = make_mtp()
    members = [Member(model, drafter, [1, 2, 3]) for _ in "ab"]
    alone = Member(model, drafter, [1, 2, 3])
    session = drafter.open_batch(Batch(model))
    for each in members:
        session.join(each.session)
    chance = random.Random(2)
    for num_rows in ([1, 1], [3, 1], [1, 1], [1, 1], [2, 2], [1, 1]):
        tokens = [[chance.randrange(NUM_TOKENS) for _ in range(3)]] * 2
        width = max(num_rows)
        states = mx.random.normal((1, width, 64), key=mx.random.key(width))
        rows = mx.array(tokens)[:, :width], mx.concatenate([states] * 2)
        session.draft(Committed(*rows, num_rows), [0, 0], Drafts())
        number = num_rows[0]
        alone.draft(tokens[0][:number], states[:, :number], 0)
    alone.session.catch_up()
    found, expected = session.release(0).entries[0], alone.session.entries[0]
    assert_same_cache([expected], [found])
