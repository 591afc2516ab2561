"""The decode loop keeps what it promises beside equal tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import SpeculationError, SpeculationStats, spec_generate_step
from tests.helpers import (
    ScriptedDrafter,
    assert_same_cache,
    assert_same_tokens,
    changing_depth,
    load_tiny,
    often_right,
)

PROMPT = mx.arange(3, 20)
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_tiny("dense")


def plain(model: nn.Module, max_tokens: int, **options: Any) -> list[Any]:
    return list(generate_step(PROMPT, model, max_tokens=max_tokens, **options))


def drafter_for(
    model: nn.Module, is_right: Callable[[int], bool] = often_right, **options: Any
) -> ScriptedDrafter:
    script = [token for token, _ in plain(model, 80, **options)]
    return ScriptedDrafter(script, VOCAB_SIZE, is_right)


def always(position: int) -> bool:
    return True


def never(position: int) -> bool:
    return False


@pytest.fixture
def num_waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that make the host wait for the device, in order."""
    waits: list[str] = []

    def count(owner: Any, name: str) -> None:
        wrapped = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            waits.append(name)
            return wrapped(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("tolist", "item", "__int__", "__bool__", "__float__", "__array__"):
        if hasattr(mx.array, name):
            count(mx.array, name)
    for name in ("eval", "synchronize"):
        count(mx, name)
    return waits


@pytest.mark.parametrize("sampler", [None, make_sampler(temp=0.8, top_p=0.9)])
@pytest.mark.parametrize("drafter", [often_right, always, never, "mtp"])
def test_a_round_waits_for_the_device_once(
    model: nn.Module, num_waits: list[str], sampler: Any, drafter: Any
) -> None:
    stats = SpeculationStats()
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=None if drafter == "mtp" else drafter_for(model, drafter),
        num_draft_tokens=3,
        max_tokens=60,
        sampler=sampler,
        logits_processors=make_logits_processors(repetition_penalty=1.1),
        stats=stats,
    )
    next(steps)
    del num_waits[:]
    num_calls_before = stats.num_target_calls
    list(steps)
    assert num_waits == ["tolist"] * (stats.num_target_calls - num_calls_before)


class CountingLinear(nn.Linear):
    num_rows = 0

    def __call__(self, x: mx.array) -> mx.array:
        CountingLinear.num_rows += x.shape[-2]
        return super().__call__(x)


def test_the_output_layer_runs_on_the_rows_that_are_read() -> None:
    model = load_tiny("dense")
    list(spec_generate_step(PROMPT, model, max_tokens=1))
    CountingLinear.num_rows = 0
    model.language_model.lm_head.__class__ = CountingLinear
    stats = SpeculationStats()
    list(
        spec_generate_step(
            PROMPT, model, num_draft_tokens=2, max_tokens=30, stats=stats
        )
    )
    # Each pass reads its own row and those of its drafts; each draft took one row.
    num_verified = stats.num_target_calls + stats.num_drafted
    assert CountingLinear.num_rows == num_verified + stats.num_drafted


def test_a_draft_behind_a_rejected_one_is_not_accepted(model: nn.Module) -> None:
    class Misled(ScriptedDrafter):
        """Wrong at first, then right about what follows the wrong token."""

        def open(self, *args: Any) -> Any:
            session = super().open(*args)

            def draft(tokens: Any, states: Any, num: int, proposal: Any) -> None:
                session.num_seen += tokens.size
                for position in range(num):
                    history = [*PROMPT.tolist(), *self.script[: session.num_seen]]
                    history += [token.item() for token in proposal.tokens]
                    logits = model(mx.array([history]))[:, -1]
                    wrong = mx.argsort(logits, axis=-1)[:, -2:-1]
                    token = mx.argmax(logits, axis=-1) if position else wrong[0]
                    proposal.add(
                        mx.where(mx.arange(VOCAB_SIZE) == token, 9.0, 0.0)[None]
                    )

            session.draft = draft
            return session

    expected = plain(model, 12)
    script = [token for token, _ in expected]
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=Misled(script, VOCAB_SIZE, always),
        num_draft_tokens=3,
        max_tokens=12,
    )
    found = list(steps)
    assert_same_tokens(expected, found)
    assert not any(is_draft for *_, is_draft in found)


def test_statistics_agree_with_what_was_emitted(model: nn.Module) -> None:
    stats = SpeculationStats()
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=drafter_for(model),
        num_draft_tokens=3,
        max_tokens=60,
        stats=stats,
    )
    from_draft = [is_draft for *_, is_draft in steps]
    assert stats.num_tokens == 60
    assert stats.num_accepted == sum(from_draft)
    assert stats.num_target_calls == 60 - sum(from_draft)
    assert stats.num_rounds == stats.num_target_calls - 1
    assert stats.mean_accepted_length == 1 + stats.num_accepted / stats.num_rounds
    assert stats.acceptance_rate == stats.num_accepted / stats.num_drafted
    assert len(stats.acceptance_rate_per_position) == 3
    first, second, third = stats.num_accepted_per_position
    assert first > second > third


def test_a_stop_inside_a_run_counts_the_tokens_emitted(model: nn.Module) -> None:
    stats = SpeculationStats()
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=drafter_for(model, always),
        num_draft_tokens=4,
        stats=stats,
    )
    for _ in range(3):
        next(steps)
    steps.close()
    assert (stats.num_tokens, stats.num_accepted, stats.num_drafted) == (3, 2, 4)


class CountingSampler:
    """Opaque and stateful: every third call takes the second most probable token."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        self.num_calls += 1
        rank = 2 if self.num_calls % 3 == 0 else 1
        return mx.argsort(logprobs, axis=-1)[:, -rank]


def test_an_opaque_sampler_is_called_as_plain_decoding_calls_it(
    model: nn.Module,
) -> None:
    expected = plain(model, 60, sampler=CountingSampler())
    sampler = CountingSampler()
    drafter = ScriptedDrafter([token for token, _ in expected], VOCAB_SIZE, often_right)
    found = list(
        spec_generate_step(
            PROMPT,
            model,
            drafter=drafter,
            num_draft_tokens=4,
            max_tokens=60,
            sampler=sampler,
        )
    )
    assert_same_tokens(expected, found)
    assert sum(is_draft for *_, is_draft in found) > 20
    assert sampler.num_calls == 60


def test_an_opaque_random_sampler_draws_what_plain_decoding_draws(
    model: nn.Module,
) -> None:
    def sampler(logprobs: mx.array) -> mx.array:
        return mx.random.categorical(logprobs)

    mx.random.seed(7)
    expected = plain(model, 40, sampler=sampler)
    drafter = ScriptedDrafter([token for token, _ in expected], VOCAB_SIZE, often_right)
    mx.random.seed(7)
    found = spec_generate_step(
        PROMPT,
        model,
        drafter=drafter,
        num_draft_tokens=3,
        max_tokens=40,
        sampler=sampler,
    )
    assert_same_tokens(expected, list(found))


class StatefulProcessor:
    """Forbids tokens by the number of its calls, and notes what it was shown."""

    def __init__(self) -> None:
        self.histories: list[list[int]] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.histories.append(tokens.tolist())
        forbidden = (7 * len(self.histories)) % VOCAB_SIZE
        logits[:, forbidden : forbidden + 40] = -1e9
        return logits


def test_a_stateful_processor_sees_what_it_sees_in_plain_decoding(
    model: nn.Module,
) -> None:
    one, other = StatefulProcessor(), StatefulProcessor()
    expected = plain(model, 50, logits_processors=[one])
    drafter = ScriptedDrafter([token for token, _ in expected], VOCAB_SIZE, often_right)
    found = list(
        spec_generate_step(
            PROMPT,
            model,
            drafter=drafter,
            num_draft_tokens=3,
            max_tokens=50,
            logits_processors=[other],
        )
    )
    assert_same_tokens(expected, found)
    # Plain decoding looks one token further than it yields.
    assert other.histories == one.histories[:50]
    assert sum(is_draft for *_, is_draft in found) > 10


class FailingProcessor:
    def __init__(self, num_calls: int):
        self.num_calls = num_calls

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.num_calls -= 1
        if self.num_calls < 0:
            raise RuntimeError("the processor failed")
        return logits


@pytest.mark.parametrize("num_calls", range(8))
def test_an_error_of_the_user_leaves_the_cache_with_what_was_yielded(
    model: nn.Module, num_calls: int
) -> None:
    prompt_cache, yielded = make_prompt_cache(model), []
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=drafter_for(model, always),
        num_draft_tokens=3,
        logits_processors=[FailingProcessor(num_calls)],
        prompt_cache=prompt_cache,
    )
    with pytest.raises(RuntimeError, match="the processor failed"):
        yielded.extend(token for token, *_ in steps)
    assert len(yielded) == num_calls
    assert_holds(prompt_cache, model, yielded)


def test_an_error_of_the_drafter_leaves_the_cache_with_what_was_yielded(
    model: nn.Module,
) -> None:
    class Failing(ScriptedDrafter):
        def open(self, *args: Any) -> Any:
            session = super().open(*args)
            logits = session.logits

            def fail(position: int) -> mx.array:
                if position > 9:
                    raise RuntimeError("the drafter failed")
                return logits(position)

            session.logits = fail
            return session

    prompt_cache, yielded = make_prompt_cache(model), []
    script = drafter_for(model).script
    steps = spec_generate_step(
        PROMPT,
        model,
        drafter=Failing(script, VOCAB_SIZE, always),
        num_draft_tokens=2,
        prompt_cache=prompt_cache,
    )
    with pytest.raises(RuntimeError, match="the drafter failed"):
        yielded.extend(token for token, *_ in steps)
    assert_holds(prompt_cache, model, yielded)


def assert_holds(prompt_cache: list[Any], model: nn.Module, yielded: list[int]) -> None:
    """A cache holds the prompt and these tokens, as if each had been fed alone."""
    expected = make_prompt_cache(model)
    for tokens in (PROMPT[:-1], PROMPT[-1:], *(mx.array([t]) for t in yielded)):
        model(tokens[None], cache=expected)
    assert_same_cache(expected, prompt_cache[: len(expected)])


def test_progress_is_reported_as_in_plain_decoding(model: nn.Module) -> None:
    def progress(generate: Callable[..., Iterator[Any]]) -> list[Any]:
        calls: list[Any] = []
        steps = generate(
            PROMPT,
            model,
            max_tokens=3,
            prefill_step_size=6,
            prompt_progress_callback=lambda *call: calls.append(call),
        )
        next(steps)
        return calls

    assert progress(spec_generate_step) == progress(generate_step)


def test_input_embeddings_give_what_they_give_in_plain_decoding(
    model: nn.Module,
) -> None:
    embeddings = 0.1 * mx.random.normal((17, 64), key=mx.random.key(1))
    for prompt in (PROMPT, mx.array([], mx.int32)):
        options = {
            "input_embeddings": embeddings,
            "prefill_step_size": 5,
            "max_tokens": 30,
            "logits_processors": make_logits_processors(repetition_penalty=1.2),
        }
        expected = list(generate_step(prompt, model, **options))
        found = spec_generate_step(prompt, model, num_draft_tokens=2, **options)
        assert_same_tokens(expected, list(found))


def test_no_limit_means_no_limit(model: nn.Module) -> None:
    steps = spec_generate_step(
        PROMPT, model, drafter=drafter_for(model), max_tokens=-1, num_draft_tokens=2
    )
    expected = plain(model, 70)
    assert_same_tokens(expected, [next(steps) for _ in range(70)])


def test_the_same_seed_gives_the_same_text(model: nn.Module) -> None:
    def text(seed: int) -> list[int]:
        mx.random.seed(seed)
        steps = spec_generate_step(
            PROMPT, model, sampler=make_sampler(temp=1.0, top_k=50), max_tokens=40
        )
        return [token for token, *_ in steps]

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize("number", [0, 9, -1, 1.0, "2", None, True])
def test_a_wrong_number_of_draft_tokens_is_named(model: nn.Module, number: Any) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 8, got {number!r}"):
        next(spec_generate_step(PROMPT, model, num_draft_tokens=number))


def test_an_empty_prompt_is_refused_as_in_plain_decoding(model: nn.Module) -> None:
    for generate in (generate_step, spec_generate_step):
        with pytest.raises(ValueError, match="must be provided"):
            next(generate(mx.array([], mx.int32), model))


def test_a_cache_for_another_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="has 1 entries, expected 4"):
        next(spec_generate_step(PROMPT, model, prompt_cache=[KVCache()]))


def test_an_unknown_cache_entry_is_refused_before_the_first_token(
    model: nn.Module,
) -> None:
    class Unheard(KVCache):
        pass

    class Unrelated:
        offset = 0

    prompt_cache = make_prompt_cache(model)
    prompt_cache[3] = Unrelated()
    with pytest.raises(SpeculationError, match="Unrelated"):
        next(spec_generate_step(PROMPT, model, prompt_cache=prompt_cache))


def test_an_interrupted_parked_round_leaves_what_was_yielded() -> None:
    model = load_tiny("dense")
    num_calls = itertools.count()

    def interrupt(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(num_calls) == 5:
            raise KeyboardInterrupt
        return logits

    cache_, taken = make_prompt_cache(model), list[int]()
    num_entries = len(cache_)
    steps = spec_generate_step(
        PROMPT, model, logits_processors=[interrupt], prompt_cache=cache_
    )
    with changing_depth((0,)), pytest.raises(KeyboardInterrupt):
        taken.extend(token for token, *_ in steps)
    assert len(taken) == 4
    expected = make_prompt_cache(model)
    list(generate_step(PROMPT, model, max_tokens=4, prompt_cache=expected))
    assert_same_cache(expected, cache_[:num_entries])


def test_every_token_says_what_proposed_it(model: nn.Module) -> None:
    stats = SpeculationStats(records_sources=True)
    steps = spec_generate_step(
        PROMPT, model, drafter=drafter_for(model), max_tokens=40, stats=stats
    )
    for num_tokens, (*_, is_draft) in enumerate(steps, 1):
        assert len(stats.token_sources) == num_tokens
        assert stats.token_sources[-1] == ("scripted" if is_draft else None)
    assert "scripted" in stats.token_sources


def test_sources_are_not_kept_unless_they_are_asked_for(model: nn.Module) -> None:
    stats = SpeculationStats()
    list(spec_generate_step(PROMPT, model, max_tokens=4, stats=stats))
    assert stats.token_sources == []


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_a_generation_that_is_left_is_ended_by_the_next_one(
    model: nn.Module, num_tokens: int
) -> None:
    """Its rows would otherwise still be in the cache that both have."""
    prompt_cache, script = make_prompt_cache(model), drafter_for(model, always)
    left = spec_generate_step(
        PROMPT, model, drafter=script, num_draft_tokens=3, prompt_cache=prompt_cache
    )
    taken = [next(left)[0] for _ in range(num_tokens)]
    following = mx.array([5, 6])
    found = list(
        spec_generate_step(following, model, prompt_cache=prompt_cache, max_tokens=12)
    )
    expected = make_prompt_cache(model)
    list(generate_step(PROMPT, model, max_tokens=num_tokens, prompt_cache=expected))
    plain_steps = generate_step(following, model, max_tokens=12, prompt_cache=expected)
    assert taken == [token for token, _ in plain(model, num_tokens)]
    assert_same_tokens(list(plain_steps), found)
    with pytest.raises(RuntimeError, match="given to another generation"):
        list(left)
    assert_same_cache(expected, prompt_cache[: len(expected)])
