"""Sequences decoded alone, together and alone again give what each gives by itself."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import SpeculationStats
from mlx_optiq_ext.decoding import spec_generate_step
from mlx_optiq_ext.decoding._batch import (
    ReadableRow,
    SequenceOptions,
    SpeculativeBatch,
)
from mlx_optiq_ext.drafters import MTPDrafter, keep_primed
from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from mlx_optiq_ext.serving._speculation import ServedSpeculation
from tests.helpers import DEMO, assert_same_cache, load_tiny

LENGTHS = (9, 17, 4, 12)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = load_tiny("dense")
    attach_mtp(model)
    keep_primed(MTPDrafter(model), model)
    return model


class Batching:
    """A batch generator of mlx-lm with a speculative batch in it."""

    def __init__(self, model: nn.Module, num_draft_tokens: int = 2):
        self.model = model
        self.generator = BatchGenerator(model, prefill_step_size=8)
        self.stats: dict[int, SpeculationStats] = defaultdict(SpeculationStats)
        self.generator._generation_batch = SpeculativeBatch(
            model,
            self.generator.sampler,
            MTPDrafter(model),
            lambda uid: SequenceOptions(num_draft_tokens, self.stats[uid]),
        )
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, Any] = {}

    def add(
        self,
        prompt: mx.array,
        max_tokens: int,
        prompt_cache: list[Any] | None = None,
        **options: Any,
    ) -> int:
        lists = {name: [value] for name, value in options.items()}
        served = ServedSpeculation(self.model, MTPDrafter(self.model))
        (uid,) = self.generator.insert(
            [prompt.tolist()],
            [max_tokens],
            caches=[served.complete(prompt_cache, None)],
            **lists,
        )
        return uid

    def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            for response in self.generator.next()[1]:
                self.tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    self.ends[response.uid] = response

    def finish(self) -> None:
        while len(self.ends) < self.generator._uid_count:
            self.step()


def prompt_of(index: int) -> mx.array:
    return mx.random.randint(0, 320, (LENGTHS[index],), key=mx.random.key(index))


def alone(model: nn.Module, index: int, max_tokens: int, **options: Any) -> Any:
    prompt_cache = make_prompt_cache(model)
    steps = generate_step(
        prompt_of(index),
        model,
        max_tokens=max_tokens,
        prompt_cache=prompt_cache,
        **options,
    )
    return [token for token, _ in steps], prompt_cache


def test_one_sequence_is_decoded_in_rounds(model: nn.Module) -> None:
    batching = Batching(model)
    uid = batching.add(prompt_of(0), 40)
    batching.finish()
    tokens, prompt_cache = alone(model, 0, 40)
    assert batching.tokens[uid] == tokens
    end = batching.ends[uid]
    assert end.finish_reason == "length"
    assert end.all_tokens == [*prompt_of(0).tolist(), *tokens]
    assert_same_cache(prompt_cache, end.prompt_cache[:4])
    assert batching.stats[uid].num_rounds > 10
    assert len(batching.generator._generation_batch) == 0


def test_a_sequence_alone_takes_the_calls_that_it_takes_without_a_batch(
    model: nn.Module,
) -> None:
    batching, stats = Batching(model), SpeculationStats()
    uid = batching.add(prompt_of(0), 40)
    batching.finish()
    steps = spec_generate_step(
        prompt_of(0),
        model,
        drafter=MTPDrafter(model),
        max_tokens=40,
        num_draft_tokens=2,
        stats=stats,
    )
    assert batching.tokens[uid] == [token for token, *_ in steps]
    assert batching.stats[uid] == stats


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("num_steps", range(6))
def test_a_sequence_that_was_begun_without_the_head_goes_on_with_it(
    model: nn.Module, num_steps: int, is_first: bool
) -> None:
    prompt, prompt_cache = prompt_of(1), make_prompt_cache(model)
    model(prompt[None, :8], cache=prompt_cache)
    batching = Batching(model)
    if not is_first:
        batching.add(prompt_of(0), 20)
        batching.step(num_steps)
    begun = batching.add(prompt[8:], 30, prompt_cache, all_tokens=prompt[:8].tolist())
    if is_first:
        batching.step(num_steps)
        batching.add(prompt_of(0), 20)
    batching.finish()
    for uid, index, max_tokens in ((begun, 1, 30), (1 - begun, 0, 20)):
        tokens, expected = alone(model, index, max_tokens)
        assert batching.tokens[uid] == tokens
        end = batching.ends[uid]
        assert end.all_tokens == [*prompt_of(index).tolist(), *tokens]
        assert [entry.offset for entry in (end.prompt_cache[3], expected[3])] == [
            LENGTHS[index] + max_tokens
        ] * 2
    assert batching.stats[begun].num_rounds > 0


def test_a_row_is_read_while_the_device_is_busy() -> None:
    row = ReadableRow(mx.arange(1000) * 2)
    mx.eval(row.__wrapped__)
    matrix = mx.ones((900, 900))
    mx.eval(matrix)
    start = time.perf_counter()
    # Not many operations: MLX would wait before it starts them all.
    work = matrix @ matrix @ matrix
    mx.async_eval(work)
    assert row[21].item() == 42
    assert row[[3, 4]].tolist() == [6, 8]
    until_read = time.perf_counter() - start
    mx.eval(work)
    assert until_read < 0.5 * (time.perf_counter() - start)


@pytest.mark.parametrize("num_steps", range(6))
def test_sequences_that_come_and_go_are_not_changed_by_each_other(
    model: nn.Module, num_steps: int
) -> None:
    batching = Batching(model)
    for index, max_tokens in enumerate((40, 12, 30, 25)):
        batching.add(prompt_of(index), max_tokens)
        batching.step(num_steps)
    batching.finish()
    for index, max_tokens in enumerate((40, 12, 30, 25)):
        tokens, prompt_cache = alone(model, index, max_tokens)
        assert batching.tokens[index] == tokens
        assert batching.ends[index].all_tokens == [*prompt_of(index).tolist(), *tokens]
        found = batching.ends[index].prompt_cache
        assert [e.offset for e in (found[3], prompt_cache[3])] == [
            LENGTHS[index] + max_tokens
        ] * 2


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_head_stays_primed_in_a_batch(model: nn.Module, num_steps: int) -> None:
    batching = Batching(model)
    for index in range(4):
        batching.add(prompt_of(index), 10 + index)
        batching.step(num_steps)
    batching.finish()
    for index, end in batching.ends.items():
        expected = make_prompt_cache(model) + model.make_mtp_cache()
        model(mx.array(end.all_tokens)[None], cache=expected)
        kv_cache, arrays = end.prompt_cache[4:]
        assert kv_cache.offset == len(end.all_tokens) - 1
        assert arrays[1].item() == len(end.all_tokens)
        pairs = zip(
            [*expected[4].keys_and_values(), expected[5][0]],
            [*kv_cache.keys_and_values(), arrays[0]],
            strict=True,
        )
        assert all(mx.allclose(a, b, atol=1e-4).item() for a, b in pairs), index


def test_acceptance_after_a_batch_is_that_of_a_primed_head() -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model)
    keep_primed(MTPDrafter(model), model)
    rates = []
    for others in (0, 2):
        batching = Batching(model, num_draft_tokens=1)
        prompt = mx.array(tokenizer.encode("def read(path):\n    with open("))
        uid = batching.add(prompt, 100)
        for _ in range(others):
            batching.step(3)
            batching.add(prompt, 20)
        batching.finish()
        rates.append(batching.stats[uid].acceptance_rate)
    assert rates[1] > rates[0] - 0.1
    assert batching.tokens[uid] == [
        token for token, _ in generate_step(prompt, model, max_tokens=100)
    ]


def test_a_sequence_that_is_removed_leaves_the_others_as_they_were(
    model: nn.Module,
) -> None:
    batching = Batching(model)
    first, second = (batching.add(prompt_of(index), 30) for index in range(2))
    batching.step(8)
    batching.generator.remove([first])
    batching.step(40)
    assert batching.tokens[second] == alone(model, 1, 30)[0]
    third = batching.add(prompt_of(2), 30)
    batching.step(5)
    batching.generator.remove([third])
    batching.step(2)
    assert len(batching.generator._generation_batch) == 0


def test_processors_and_samplers_belong_to_their_sequence(model: nn.Module) -> None:
    batching = Batching(model)
    processors = make_logits_processors(repetition_penalty=1.4)
    batching.add(prompt_of(0), 30, logits_processors=processors)
    batching.step(6)
    batching.add(prompt_of(1), 8)
    batching.finish()
    assert batching.tokens[0] == alone(model, 0, 30, logits_processors=processors)[0]
    assert batching.tokens[1] == alone(model, 1, 8)[0]


def test_a_sampled_sequence_is_reproducible(model: nn.Module) -> None:
    def text(seed: int) -> list[int]:
        mx.random.seed(seed)
        batching = Batching(model)
        batching.add(prompt_of(0), 30, samplers=make_sampler(temp=1.0, top_k=40))
        batching.finish()
        return batching.tokens[0]

    assert text(1) == text(1) != text(2)


def test_a_stop_sequence_ends_a_sequence_inside_a_round(model: nn.Module) -> None:
    from mlx_lm.generate import StopSequences

    tokens, _ = alone(model, 0, 40)
    for length in (1, 2, 5, 6, 20):
        stop = tokens[length - 1]
        expected = tokens[: tokens.index(stop) + 1]
        batching = Batching(model, num_draft_tokens=3)
        batching.add(prompt_of(0), 40, stop_sequences=StopSequences([[stop]]))
        batching.finish()
        end = batching.ends[0]
        assert batching.tokens[0] == expected
        assert end.finish_reason == "stop"
        assert_same_cache(alone(model, 0, len(expected))[1], end.prompt_cache[:4])


def test_accepted_tokens_after_a_stop_are_not_kept() -> None:
    import mlx_lm
    from mlx_lm.generate import StopSequences

    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model)
    keep_primed(MTPDrafter(model), model)
    prompt = mx.array(tokenizer.encode("def read(path):\n    with open("))
    tokens = [token for token, _ in generate_step(prompt, model, max_tokens=40)]
    for stop in tokens[1:7]:
        num_tokens = tokens.index(stop) + 1
        prompt_cache = make_prompt_cache(model)
        steps = generate_step(
            prompt, model, max_tokens=num_tokens, prompt_cache=prompt_cache
        )
        assert len(list(steps)) == num_tokens
        batching = Batching(model, num_draft_tokens=3)
        batching.add(prompt, 40, stop_sequences=StopSequences([[stop]]))
        batching.finish()
        found = batching.ends[0].prompt_cache[: len(prompt_cache)]
        assert_same_cache(prompt_cache, found)


def test_no_draft_tokens_means_plain_decoding(model: nn.Module) -> None:
    batching = Batching(model, num_draft_tokens=0)
    uid = batching.add(prompt_of(0), 20)
    batching.finish()
    assert batching.tokens[uid] == alone(model, 0, 20)[0]
    assert batching.stats[uid].num_rounds == 0


def test_what_the_head_keeps_counts_in_the_bytes_of_a_cache(model: nn.Module) -> None:
    batching = Batching(model)
    batching.add(prompt_of(0), 30)
    batching.step(5)
    assert batching.generator._generation_batch._solo is not None
    num_bytes = batching.generator.prompt_cache_nbytes
    head, target = _num_bytes(batching.generator._generation_batch.prompt_cache)
    assert num_bytes == head + target
    assert head > 0
    batching.finish()
    end, kept = batching.ends[0], LRUPromptCache()
    kept.insert_cache("model", end.all_tokens, end.prompt_cache)
    assert kept.nbytes == sum(_num_bytes(end.prompt_cache))
    assert kept.nbytes > _num_bytes(end.prompt_cache)[1]


def _num_bytes(prompt_cache: list[Any]) -> tuple[int, int]:
    """Of the head and of the target."""
    sizes = [entry.nbytes for entry in prompt_cache]
    return sum(sizes[4:]), sum(sizes[:4])
