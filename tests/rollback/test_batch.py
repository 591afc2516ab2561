"""A sequence in a batch is what it is alone, whoever joins, leaves and keeps what."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_optiq_ext import SpeculationError
from mlx_optiq_ext.rollback import Batch, _recurrence
from mlx_optiq_ext.rollback._sequences import BatchRing
from tests.families import tiny
from tests.gemma import A4B, E4B, load_target
from tests.helpers import assert_same_cache, load_tiny
from tests.rollback.models import (
    in_bfloat16,
    tiny_gemma3,
    tiny_gpt_oss,
    tiny_llama,
)

NUM_TOKENS = 200  # that every model has
MAX_ROWS = 5

MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen dense": lambda: load_tiny("dense"),
    "qwen moe": lambda: load_tiny("moe"),
    "qwen 4-bit": lambda: load_tiny("dense-4bit"),
    "qwen bfloat16": lambda: load_tiny("dense-bf16"),
    "gemma": lambda: load_target(E4B),
    "gemma bfloat16": lambda: in_bfloat16(load_target(E4B)),
    "gemma experts": lambda: load_target(A4B),
    "gemma below the window": lambda: load_target(E4B, sliding_window=300),
    "gemma3 bfloat16": lambda: in_bfloat16(tiny_gemma3()),
    "gpt-oss": tiny_gpt_oss,
    "llama": tiny_llama,
    "llama, quantised entries": lambda: tiny_llama(head_dim=32),
    "llama, rings that keep their start": tiny_llama,
    "latent attention": lambda: tiny("deepseek_v3", vocab_size=NUM_TOKENS),
    "lists of latent attention": lambda: tiny("longcat_flash", vocab_size=NUM_TOKENS),
    "scaled latent attention": lambda: tiny("mistral4", vocab_size=NUM_TOKENS),
}


class Alone:
    """One sequence, decoded plainly: one row after the other over stock entries."""

    def __init__(self, name: str, model: nn.Module, seed: int, num_prompt_tokens: int):
        self.model = model
        self.chooser = random.Random(seed)
        max_kv_size = 14 if "keep" in name else None
        self.cache = make_prompt_cache(model, max_kv_size)
        model(self.tokens(num_prompt_tokens)[None], cache=self.cache)
        if "quantised" in name:
            maybe_quantize_kv_cache(self.cache, 0, 32, 8)
        self.num_tokens = num_prompt_tokens

    def tokens(self, number: int) -> mx.array:
        return mx.array([self.chooser.randrange(NUM_TOKENS) for _ in range(number)])

    def feed(self, tokens: mx.array) -> list[mx.array]:
        self.num_tokens += tokens.size
        return [self.model(token[None, None], cache=self.cache) for token in tokens]


class Company:
    """Sequences in a batch, each beside its own self that is decoded alone."""

    def __init__(self, name: str, seed: int = 1):
        self.name = name
        self.model = MODELS[name]()
        self.chooser = random.Random(seed)
        self.batch = Batch(self.model)
        self.members: list[Alone] = []
        self.num_joined = 0

    def join(self, num_prompt_tokens: int) -> None:
        self.num_joined += 1
        args = self.name, self.model, self.num_joined, num_prompt_tokens
        twin = Alone(*args)
        self.members.append(Alone(*args))
        # What a long prefill leaves too much of in a ring goes with the next row.
        for alone in (twin, self.members[-1]):
            alone.feed(alone.tokens(1))
        self.batch.join(twin.cache)

    def forward(self, rows: mx.array) -> mx.array:
        return self.batch.run(
            lambda entries, _: self.model(rows, cache=entries), rows.shape[1]
        )

    def round(self, is_known: bool = True) -> None:
        """A pass of which every sequence keeps a number of its own."""
        num_rows = self.chooser.randint(1, MAX_ROWS)
        rows = [member.tokens(num_rows) for member in self.members]
        logits = self.forward(mx.stack(rows))
        kept = [self.chooser.randint(0, num_rows) for _ in rows]
        self.batch.keep(kept if is_known else mx.array(kept))
        for index, (member, num_kept) in enumerate(
            zip(self.members, kept, strict=True)
        ):
            for row, expected in enumerate(member.feed(rows[index][:num_kept])):
                assert mx.array_equal(expected[0, 0], logits[index, row])
        if not is_known:
            self.batch.learn(kept)

    def check(self, index: int) -> None:
        assert_same_cache(self.members[index].cache, self.batch.extract(index))

    def leave(self, index: int) -> None:
        self.check(index)
        others = [i for i in range(len(self.members)) if i != index]
        self.batch.filter(others)
        self.members = [self.members[i] for i in others]

    def live(self) -> None:
        """Go through rounds in which others join and leave, and check who is left."""
        for num_prompt_tokens in (1, 30):
            self.join(num_prompt_tokens)
        for step in range(14):
            self.round(is_known=step % 3 > 0)
            if step in (3, 7):
                self.join({3: 11, 7: 4}[step])
            if step in (5, 9):
                self.leave(self.chooser.randrange(len(self.members)))
        for index in range(len(self.members)):
            self.check(index)


@pytest.mark.parametrize("name", MODELS)
def test_whoever_joins_and_leaves_each_sequence_is_what_it_is_alone(name: str) -> None:
    company = Company(name)
    company.live()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_sequence_can_leave_with_fewer_rows_of_the_last_pass(
    name: str, is_kept: bool
) -> None:
    for num_tokens in range(MAX_ROWS + 1):
        company = Company(name)
        for num_prompt_tokens in (6, 19):
            company.join(num_prompt_tokens)
        company.round()
        rows = [member.tokens(MAX_ROWS) for member in company.members]
        company.forward(mx.stack(rows))
        if is_kept:
            company.batch.keep([3, MAX_ROWS])
        member = company.members[1]
        number = member.num_tokens + num_tokens
        found = company.batch.extract(1, number)
        member.feed(rows[1][:num_tokens])
        assert_same_cache(member.cache, found)


def test_a_recurrence_with_a_kernel_is_run_again_on_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_recurrence, "make_call", _recurrence.Call)
    company = Company("qwen dense")
    for num_prompt_tokens in (6, 19):
        company.join(num_prompt_tokens)
    for _ in range(6):
        company.round()
    for index in range(2):
        company.check(index)


@pytest.mark.parametrize("name", ["qwen dense", "gemma bfloat16"])
def test_the_host_may_learn_of_a_pass_after_the_next_one_was_made(name: str) -> None:
    company = Company(name)
    for num_prompt_tokens in (6, 19):
        company.join(num_prompt_tokens)
    passes = []
    for kept in ([1, 4], [3, 2], [0, 5]):
        rows = [member.tokens(MAX_ROWS) for member in company.members]
        company.forward(mx.stack(rows))
        company.batch.keep(mx.array(kept))
        passes.append((rows, kept))
        if len(passes) > 1:
            company.batch.learn(passes[-2][1])
    for rows, kept in passes:
        for member, tokens, number in zip(company.members, rows, kept, strict=True):
            member.feed(tokens[:number])
    company.batch.learn(passes[-1][1])
    for index, member in enumerate(company.members):
        assert company.batch.offsets[index].item() == member.num_tokens
        company.check(index)


@pytest.mark.parametrize("is_undone", [False, True])
def test_a_ring_that_joins_after_a_long_prefill_leaves_as_it_came(
    is_undone: bool,
) -> None:
    company = Company("gemma")
    company.join(4)
    alone = Alone("gemma", company.model, 9, 30)
    company.batch.join(alone.cache)
    if is_undone:
        company.forward(mx.array([[1, 2], [3, 4]]))
        company.batch.keep([2, 0])
    assert_same_cache(alone.cache, company.batch.extract(1, 30))
    company.batch.filter([1])
    if not is_undone:
        assert_same_cache(alone.cache, company.batch.extract(0))


def test_a_batch_that_was_empty_is_joined_again() -> None:
    company = Company("qwen dense")
    company.join(5)
    company.round()
    company.leave(0)
    assert company.batch.num_sequences == 0
    for num_prompt_tokens in (3, 300):
        company.join(num_prompt_tokens)
    for _ in range(3):
        company.round()
    company.check(0)
    assert sum(entry.nbytes for entry in company.batch.entries) > 0


def test_entries_of_a_head_may_be_empty_and_are_taken_back() -> None:
    def rows(start: int, number: int) -> list[mx.array]:
        keys = [
            mx.random.normal((1, 2, 1, 8), key=mx.random.key(start + i))
            for i in range(number)
        ]
        return [mx.concatenate(keys, axis=2)] * 2

    batch, full = Batch(), KVCache()
    full.update_and_fetch(*rows(0, 4))
    for entry in (KVCache(), full, KVCache()):
        batch.join([entry])
    starts = [0, 4, 0]
    both = [mx.concatenate([rows(start, 3)[0] for start in starts])] * 2
    batch.run(lambda entries, _: entries[0].update_and_fetch(*both), 3)
    batch.keep([3, 1, 2])
    batch.run(lambda entries, _: entries[0].update_and_fetch(*both), 3)
    batch.take_back(3)
    for index, (start, number) in enumerate(zip(starts, (3, 1, 2), strict=True)):
        expected = KVCache()
        expected.update_and_fetch(*rows(0, start + number))
        assert_same_cache([expected], batch.extract(index))


@pytest.mark.parametrize("name", ["gemma", "llama, rings that keep their start"])
def test_what_a_batch_shows_is_what_its_sequences_hold(name: str) -> None:
    company = Company(name)
    for num_prompt_tokens in (3, 21, 6):
        company.join(num_prompt_tokens)
    for _ in range(6):
        company.round()
        for number, entry in enumerate(company.batch.entries):
            keys, values, num_rows = company.batch.visible(number)
            for index, member in enumerate(company.members):
                held = slice(num_rows[index].item())
                one = slice(index, index + 1), slice(None), held
                expected = member.cache[number].keys_and_values()
                if isinstance(entry, BatchRing):
                    order = member.cache[number]._temporal_order
                    expected = map(order, expected)
                for found, wanted in zip((keys, values), expected, strict=True):
                    assert mx.array_equal(found[one], wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkedKVCache(8), "is a ChunkedKVCache"),
        (lambda: ArraysCache(2), "is a ArraysCache"),
        (lambda: RotatingKVCache(8), "is a RotatingKVCache"),
        (lambda: CacheList(KVCache(), ChunkedKVCache(8)), "is a ChunkedKVCache"),
    ],
)
def test_what_cannot_be_taken_in_is_refused(
    make: Callable[[], Any], message: str
) -> None:
    batch = Batch()
    with pytest.raises(SpeculationError, match=message):
        batch.join([make()])
    assert batch.num_sequences == 0


def test_entries_unlike_those_of_others_are_refused_and_nothing_changes() -> None:
    company = Company("llama")
    company.join(9)
    name = "llama, quantised entries"
    other = Alone(name, MODELS[name](), 1, 5)
    with pytest.raises(SpeculationError, match="QuantizedKVCache where others"):
        company.batch.join(other.cache)
    company.round()
    company.check(0)
