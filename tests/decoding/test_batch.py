"""Sequences decoded alone, together and alone again give what each gives by itself."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import SpeculationStats
from mlx_optiq_ext.decoding import (
    SequenceOptions,
    SpeculativeBatchGenerator,
    spec_generate_step,
)
from mlx_optiq_ext.decoding._batch import ReadableRow
from mlx_optiq_ext.drafters import MTPDrafter
from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from tests.decoding.test_acceptance import TOLERATED_P_VALUE, exact, p_value
from tests.drafters.test_draft_vocab import MarkovHead, MarkovTarget
from tests.helpers import DEMO, assert_same_cache, load_tiny

LENGTHS = (9, 17, 4, 12)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = load_tiny("dense")
    attach_mtp(model)
    return model


class Batching:
    """A batch generator that speculates, and what it generated."""

    def __init__(self, model: nn.Module, num_draft_tokens: Any = 2):
        self.model = model
        self.generator = SpeculativeBatchGenerator(model, prefill_step_size=8)
        self.num_draft_tokens = num_draft_tokens
        self.stats: dict[int, SpeculationStats] = defaultdict(SpeculationStats)
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
        (uid,) = self.generator.insert(
            [prompt.tolist()], [max_tokens], caches=[prompt_cache], **lists
        )
        sequence = SequenceOptions(self.num_draft_tokens, self.stats[uid])
        self.generator.set_options(uid, sequence)
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
        expected = make_prompt_cache(model)
        everything = mx.array(end.all_tokens)
        list(spec_generate_step(everything, model, max_tokens=0, prompt_cache=expected))
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


def failing_after(num_calls: int) -> Any:
    """A logits processor or sampler that raises in the end."""
    calls: list[int] = []

    def fail(*arguments: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) > num_calls:
            raise RuntimeError("broken on purpose")
        return arguments[-1]

    return fail


@pytest.mark.parametrize("num_calls", [0, 1, 5])
def test_a_processor_that_raises_ends_its_own_sequence(
    model: nn.Module, num_calls: int
) -> None:
    batching = Batching(model)
    broken = batching.add(
        prompt_of(0), 30, logits_processors=[failing_after(num_calls)]
    )
    others = [batching.add(prompt_of(index), 25) for index in (1, 2)]
    num_failures = 0
    while len(batching.ends) < len(others):
        try:
            batching.step()
        except RuntimeError:
            num_failures += 1
    assert num_failures == 1
    assert batching.tokens[broken] == alone(model, 0, 30)[0][:num_calls]
    assert batching.tokens[others[0]] == alone(model, 1, 25)[0]
    assert batching.tokens[others[1]] == alone(model, 2, 25)[0]


def test_logits_that_are_no_numbers_stay_with_their_sequence(model: nn.Module) -> None:
    batching = Batching(model)

    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits * mx.nan

    batching.add(prompt_of(0), 20, logits_processors=[spoil])
    others = [batching.add(prompt_of(index), 25) for index in (1, 2)]
    batching.finish()
    for index, uid in enumerate(others, 1):
        tokens, expected = alone(model, index, 25)
        assert batching.tokens[uid] == tokens
        assert_same_cache(expected, batching.ends[uid].prompt_cache[:4])


def opaque(logprobs: mx.array) -> mx.array:
    """A sampler that nobody can look into, and that draws as any other."""
    return mx.random.categorical(logprobs)


SAMPLERS = {
    "hot": make_sampler(temp=1.0),
    "filtered": make_sampler(temp=0.8, top_p=0.9, top_k=40),
    "xtc": make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.01),
    "opaque": opaque,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, "auto"])
def test_a_seed_gives_one_text_whatever_the_company(
    model: nn.Module, sampler: str, num_draft_tokens: Any
) -> None:
    def texts(company: int, number: Any, num_steps: int) -> list[list[int]]:
        mx.random.seed(company)
        batching, found = Batching(model, number), []
        for index in range(3):
            for _ in range(company):
                batching.add(prompt_of(3), 12, samplers=opaque)
            uid = batching.add(prompt_of(index), 20, samplers=SAMPLERS[sampler])
            options = SequenceOptions(number, batching.stats[uid], seed=40 + index)
            batching.generator.set_options(uid, options)
            batching.step(num_steps)
            found.append(uid)
        batching.finish()
        return [batching.tokens[uid] for uid in found]

    expected = texts(0, 2, 60)
    assert len({tuple(text) for text in expected}) == 3
    assert texts(1, num_draft_tokens, 2) == expected
    assert texts(2, num_draft_tokens, 0) == expected


def test_what_samplers_draw_leaves_the_global_generator_as_it_was(
    model: nn.Module,
) -> None:
    batching = Batching(model)
    mx.random.seed(3)
    for seed in (1, 2):
        uid = batching.add(prompt_of(0), 8, samplers=opaque)
        options = SequenceOptions(2, batching.stats[uid], seed=seed)
        batching.generator.set_options(uid, options)
    batching.finish()
    found = mx.random.uniform().item()
    mx.random.seed(3)
    assert found == mx.random.uniform().item()
    assert batching.tokens[0] != batching.tokens[1]


def test_a_seed_gives_the_text_that_it_gives_without_a_batch(model: nn.Module) -> None:
    batching = Batching(model, 3)
    uid = batching.add(prompt_of(0), 20, samplers=make_sampler(temp=1.0))
    options = SequenceOptions(3, batching.stats[uid], seed=5)
    batching.generator.set_options(uid, options)
    batching.add(prompt_of(1), 20)
    batching.finish()
    for number in (1, "auto"):
        steps = spec_generate_step(
            prompt_of(0),
            model,
            num_draft_tokens=number,
            max_tokens=20,
            sampler=make_sampler(temp=1.0),
            seed=5,
        )
        assert [token for token, *_ in steps] == batching.tokens[uid]


def test_two_sampled_sequences_have_their_joint_distribution() -> None:
    """Neither takes part in what the other draws, nor do drafts in either."""
    mx.random.seed(17)
    target, settings = MarkovTarget(), {"temp": 1.0, "top_p": 0.9}
    generator = SpeculativeBatchGenerator(
        target,
        drafter=MarkovHead(target, kept=[0, 1, 3, 4, 7, 8]),
        num_draft_tokens=2,
        max_tokens=4000,
        sampler=make_sampler(**settings),
    )
    generator.insert([[0], [1]])
    texts: dict[int, list[int]] = {0: [0], 1: [1]}
    while responses := generator.next_generated():
        for response in responses:
            texts[response.uid].append(response.token)
    steps = list(zip(*texts.values(), strict=True))
    following = defaultdict(list)
    for before, after in itertools.pairwise(steps):
        following[before].append(after[0] * 12 + after[1])
    common = sorted(following, key=lambda pair: -len(following[pair]))[:3]
    for pair in common:
        rows = [exact(target.rows.weight[:, last][None], settings) for last in pair]
        expected = (rows[0].reshape(12, 1) * rows[1].reshape(1, 12)).flatten()
        assert p_value(mx.array(following[pair]), expected) > TOLERATED_P_VALUE
