"""The rules draw from the distribution that the user's sampler draws from.

The expected distribution is computed here in float64, from the definitions of the
filters and not by mlx-lm's code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from mlx_optiq_ext.decoding._acceptance import (
    DraftToken,
    ExactMatch,
    Greedy,
    SharedNoise,
    SpeculativeSampling,
    is_pure,
    rule_for,
)
from mlx_optiq_ext.decoding._rows import Proposal, Verifier, logprobs_of
from tests.helpers import CHANGING, changing_depth

VOCAB_SIZE = 12
NUM_DRAWS = 100_000
XTC_DRAWS = 1_500  # one coin a call, so these cannot be drawn in one batch
TOLERATED_P_VALUE = 1e-4

Distribution = np.ndarray[Any, np.dtype[np.float64]]


def logits_of(seed: int) -> mx.array:
    """Peaked logits without ties; another seed is another model."""
    return 1.7 * mx.random.normal((1, VOCAB_SIZE), key=mx.random.key(seed))


TARGET, DRAFTER = logits_of(3), logits_of(3) + 0.6 * logits_of(4)


def softmax(logits: Distribution) -> Distribution:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def top_p(logprobs: Distribution, limit: float) -> Distribution:
    order = np.argsort(-logprobs)
    mass_above = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
    kept = order[mass_above < limit * np.exp(logprobs).sum()]
    return only(logprobs, kept)


def min_p(logprobs: Distribution, limit: float) -> Distribution:
    return only(logprobs, np.flatnonzero(logprobs >= logprobs.max() + np.log(limit)))


def top_k(logprobs: Distribution, k: int) -> Distribution:
    return only(logprobs, np.argsort(-logprobs)[:k])


def only(logprobs: Distribution, kept: Any) -> Distribution:
    filtered = np.full_like(logprobs, -np.inf)
    filtered[kept] = logprobs[kept]
    return filtered


def exact(logits: mx.array, settings: dict[str, float]) -> Distribution:
    """The distribution of one token under mlx-lm's sampler with these settings."""
    logits64 = np.array(logits[0], dtype=np.float64)
    logprobs = np.log(softmax(logits64))
    if "top_p" in settings:
        logprobs = top_p(logprobs, settings["top_p"])
    if "min_p" in settings:
        logprobs = min_p(logprobs, settings["min_p"])
    chance = settings.get("xtc_probability", 0.0)
    return chance * finish(xtc(logprobs, settings), settings) + (1 - chance) * finish(
        logprobs, settings
    )


def xtc(logprobs: Distribution, settings: dict[str, float]) -> Distribution:
    """Without all but the least probable of the tokens above the threshold."""
    probs = softmax(logprobs)
    above = probs > settings.get("xtc_threshold", 1.0)
    removed = above & (probs > probs[above].min()) if above.any() else above
    return only(logprobs, np.flatnonzero(~removed))


def finish(logprobs: Distribution, settings: dict[str, float]) -> Distribution:
    if "top_k" in settings:
        logprobs = top_k(logprobs, int(settings["top_k"]))
    return softmax(logprobs / settings["temp"])


def p_value(tokens: mx.array, expected: Distribution) -> float:
    """Of Pearson's chi-square test; 0 if a token that cannot be drawn was drawn."""
    counts = np.bincount(np.array(tokens), minlength=len(expected))
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0] * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return chi_square_tail(float(statistic), len(counts) - 1)


def chi_square_tail(statistic: float, num_degrees: int) -> float:
    """P(X > statistic), by the cube root approximation of Wilson and Hilferty."""
    if num_degrees == 0:
        return 1.0
    spread = 2 / (9 * num_degrees)
    z = ((statistic / num_degrees) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)
    from math import erfc

    return erfc(z / 2**0.5) / 2


def rows(logits: mx.array, num_rows: int) -> mx.array:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.repeat(logprobs, num_rows, axis=0)


def draw_in_batch(rule: Any, with_draft: bool, num_draws: int) -> tuple[Any, Any]:
    draft = rule.propose(rows(DRAFTER, num_draws)) if with_draft else None
    return rule.judge(rows(TARGET, num_draws), draft)


def draw_one_by_one(rule: Any, with_draft: bool, num_draws: int) -> tuple[Any, Any]:
    pairs = [draw_in_batch(rule, with_draft, 1) for _ in range(num_draws)]
    tokens, is_accepted = zip(*pairs, strict=True)
    return mx.concatenate(list(tokens)), mx.concatenate(list(is_accepted))


SETTINGS: dict[str, dict[str, float]] = {
    "temperature": {"temp": 1.0},
    "low temperature": {"temp": 0.6},
    "high temperature": {"temp": 1.7},
    "top-p": {"temp": 0.8, "top_p": 0.85},
    "top-k": {"temp": 1.0, "top_k": 4},
    "min-p": {"temp": 1.3, "min_p": 0.1},
    "recommended": {"temp": 1.0, "top_p": 0.95, "top_k": 6},
    "all": {"temp": 0.9, "top_p": 0.9, "min_p": 0.03, "top_k": 5},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1},
    "xtc and top-k": {
        "temp": 0.8,
        "top_k": 5,
        "xtc_probability": 0.3,
        "xtc_threshold": 0.15,
    },
}


def draws_of(name: str) -> Callable[[Any, bool], tuple[mx.array, mx.array]]:
    if "xtc" in name:
        return partial(draw_one_by_one, num_draws=XTC_DRAWS)
    return partial(draw_in_batch, num_draws=NUM_DRAWS)


@pytest.mark.parametrize("with_draft", [True, False], ids=["drafted", "bonus"])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_have_the_distribution_of_the_sampler(
    name: str, with_draft: bool
) -> None:
    mx.random.seed(20)
    rule = rule_for(make_sampler(**SETTINGS[name]))
    assert isinstance(rule, SpeculativeSampling)
    tokens, is_accepted = draws_of(name)(rule, with_draft)
    assert p_value(tokens, exact(TARGET, SETTINGS[name])) > TOLERATED_P_VALUE
    if with_draft:
        assert 0.2 < is_accepted.astype(mx.float32).mean().item() < 0.95
    else:
        assert not is_accepted.any().item()


@pytest.mark.parametrize("name", ["temperature", "top-p", "recommended"])
def test_accepted_and_recovered_tokens_have_the_distributions_of_the_paper(
    name: str,
) -> None:
    mx.random.seed(21)
    rule = rule_for(make_sampler(**SETTINGS[name]))
    p, q = exact(TARGET, SETTINGS[name]), exact(DRAFTER, SETTINGS[name])
    tokens, is_accepted = (np.array(x) for x in draws_of(name)(rule, True))
    accepted, recovered = np.minimum(p, q), np.maximum(p - q, 0)
    assert p_value(tokens[is_accepted], accepted / accepted.sum()) > TOLERATED_P_VALUE
    assert (
        p_value(tokens[~is_accepted], recovered / recovered.sum()) > TOLERATED_P_VALUE
    )
    assert is_accepted.mean() == pytest.approx(accepted.sum(), abs=0.01)


class TemperatureOnlyOnBonus(SpeculativeSampling):
    """A wrong rule: the bonus token is drawn without the filters."""

    def judge(self, logprobs: mx.array, draft: DraftToken | None) -> Any:
        if draft is None:
            token = mx.random.categorical(logprobs * self._inverse_temperature)
            return token, mx.zeros(token.shape, mx.bool_)
        return super().judge(logprobs, draft)


class RecoversFromTarget(SpeculativeSampling):
    """A wrong rule: a rejected token is drawn anew from the target's distribution."""

    def judge(self, logprobs: mx.array, draft: DraftToken | None) -> Any:
        token, is_accepted = super().judge(logprobs, draft)
        again = mx.random.categorical(self._scale(logprobs))
        return mx.where(is_accepted, token, again), is_accepted


class AcceptsUnfiltered(SpeculativeSampling):
    """A wrong rule: the draft is drawn from unfiltered probabilities, judged as if."""

    def propose(self, logprobs: mx.array) -> DraftToken:
        scaled = logprobs * self._inverse_temperature
        filtered = super().propose(logprobs)
        return DraftToken(mx.random.categorical(scaled), filtered.probs)


@pytest.mark.parametrize(
    ("wrong_rule", "with_draft"),
    [
        (TemperatureOnlyOnBonus, False),
        (RecoversFromTarget, True),
        (AcceptsUnfiltered, True),
    ],
)
def test_the_chi_square_test_finds_a_wrong_rule(
    wrong_rule: type[SpeculativeSampling], with_draft: bool
) -> None:
    mx.random.seed(22)
    settings = SETTINGS["recommended"]
    right = rule_for(make_sampler(**settings))
    rule = wrong_rule(right._filters, settings["temp"])
    tokens, _ = draw_in_batch(rule, with_draft, NUM_DRAWS)
    assert p_value(tokens, exact(TARGET, settings)) < 1e-12


def test_penalties_shape_the_distribution_of_drafted_and_bonus_tokens() -> None:
    mx.random.seed(23)
    processors = make_logits_processors(
        logit_bias={2: 1.5}, repetition_penalty=1.6, presence_penalty=0.7
    )
    settings = {"temp": 1.0, "top_p": 0.95}
    verifier = Verifier(make_sampler(**settings), processors)
    assert not verifier.is_stepwise
    history = mx.array([1, 5, 5, 7])
    drawn: dict[int, list[mx.array]] = {0: [], 1: []}
    for _ in range(800):
        proposal = Proposal(verifier, history)
        proposal.add(DRAFTER)
        # The history of the second row depends on the draft: fix it by choosing.
        logits = mx.stack([TARGET, TARGET], axis=1)
        first, second = verifier.rows(logits, proposal)
        drawn[0].append(first.token)
        drawn[1].append(mx.concatenate([proposal.tokens[0], second.token]))
    processed = partial(logprobs_of, processors=processors)
    expected = exact(processed(TARGET + 0, history), settings)
    assert p_value(mx.concatenate(drawn[0]), expected) > TOLERATED_P_VALUE
    pairs = np.array(mx.stack(drawn[1]))
    for draft in np.unique(pairs[:, 0]):
        longer = mx.concatenate([history, mx.array([int(draft)])])
        expected = exact(processed(TARGET + 0, longer), settings)
        tokens = mx.array(pairs[pairs[:, 0] == draft, 1])
        assert p_value(tokens, expected) > TOLERATED_P_VALUE


@pytest.mark.parametrize("with_draft", [True, False], ids=["drafted", "bonus"])
@pytest.mark.parametrize("name", ["xtc", "xtc and top-k"])
def test_many_tokens_have_the_distribution_that_the_coin_of_xtc_leaves(
    name: str, with_draft: bool
) -> None:
    settings, num_rows = SETTINGS[name], 50
    rule, chance = rule_for(make_sampler(**settings)), settings["xtc_probability"]
    drawn: dict[float, list[mx.array]] = {0.0: [], 1.0: []}
    for seed in range(0, 2 * NUM_DRAWS // num_rows, 2):
        mx.random.seed(seed)
        draft = rule.propose(rows(DRAFTER, num_rows)) if with_draft else None
        # The first number that judging draws is the coin, one for all rows of a call.
        mx.random.seed(seed + 1)
        coin = float(mx.random.uniform(0, 1).item() <= chance)
        mx.random.seed(seed + 1)
        drawn[coin].append(rule.judge(rows(TARGET, num_rows), draft)[0])
    for coin, tokens in drawn.items():
        expected = exact(TARGET, {**settings, "xtc_probability": coin})
        assert p_value(mx.concatenate(tokens), expected) > TOLERATED_P_VALUE
    num_calls = NUM_DRAWS // num_rows
    assert abs(len(drawn[1.0]) / num_calls - chance) < 4 * (0.25 / num_calls) ** 0.5


@pytest.mark.parametrize("with_draft", [True, False], ids=["drafted", "bonus"])
@pytest.mark.parametrize("history", [[1, 5, 5, 7], [1, 5, 5, 7, 3]])
def test_many_tokens_have_the_distribution_that_penalties_leave(
    history: list[int], with_draft: bool
) -> None:
    mx.random.seed(25)
    settings = {"temp": 1.0, "top_p": 0.95}
    verifier = Verifier(
        make_sampler(**settings),
        make_logits_processors({2: 1.5}, 1.6, 20, 0.7, 20, 0.4, 20),
    )
    target, drafter = (
        logprobs_of(logits + 0, mx.array(history), verifier.processors)
        for logits in (TARGET, DRAFTER)
    )
    draft = verifier.rule.propose(rows(drafter, NUM_DRAWS)) if with_draft else None
    tokens, _ = verifier.rule.judge(rows(target, NUM_DRAWS), draft)
    assert p_value(tokens, exact(target, settings)) > TOLERATED_P_VALUE


def test_the_rule_follows_from_the_sampler() -> None:
    assert isinstance(rule_for(None), Greedy)
    assert isinstance(rule_for(make_sampler(temp=0.0)), Greedy)
    assert isinstance(rule_for(make_sampler(temp=0.5)), SpeculativeSampling)
    assert isinstance(rule_for(lambda x: mx.argmax(x, axis=-1)), ExactMatch)


def test_only_the_processors_of_mlx_lm_are_known_to_be_pure() -> None:
    known = make_logits_processors({1: 1.0}, 1.1, 20, 0.5, 20, 0.5)
    assert len(known) == 4
    assert all(map(is_pure, known))
    assert not is_pure(lambda tokens, logits: logits)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "xtc" not in name])
def test_tokens_of_shared_noise_have_the_distribution_of_the_sampler(name: str) -> None:
    mx.random.seed(26)
    rule = rule_for(make_sampler(**SETTINGS[name]), is_timed=True)
    assert isinstance(rule, SharedNoise)
    draft = rule.propose(rows(DRAFTER, NUM_DRAWS), 7)
    tokens, is_accepted = rule.judge(rows(TARGET, NUM_DRAWS), draft, 7)
    assert p_value(tokens, exact(TARGET, SETTINGS[name])) > TOLERATED_P_VALUE
    assert p_value(draft.token, exact(DRAFTER, SETTINGS[name])) > TOLERATED_P_VALUE
    # Independent draws would agree as often as the squared probabilities say.
    independent = (exact(TARGET, SETTINGS[name]) * exact(DRAFTER, SETTINGS[name])).sum()
    assert is_accepted.astype(mx.float32).mean().item() > independent + 0.1


def test_shared_noise_differs_from_token_to_token() -> None:
    mx.random.seed(27)
    rule = rule_for(make_sampler(temp=1.0), is_timed=True)
    drawn = [rule.judge(rows(TARGET, 1), None, index)[0] for index in range(5_000)]
    tokens = mx.concatenate(drawn)
    assert p_value(tokens, exact(TARGET, {"temp": 1.0})) > TOLERATED_P_VALUE
    # Successive tokens are independent: pairs are as frequent as their parts say.
    pairs = tokens[1:] * VOCAB_SIZE + tokens[:-1]
    single = exact(TARGET, {"temp": 1.0})
    frequent = np.flatnonzero(np.outer(single, single).ravel() > 0.01)
    counts = np.bincount(np.array(pairs), minlength=VOCAB_SIZE**2)[frequent]
    expected = np.outer(single, single).ravel()[frequent] * pairs.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square_tail(statistic, len(frequent)) > TOLERATED_P_VALUE


def test_a_second_generation_has_other_noise() -> None:
    mx.random.seed(28)
    rules = [rule_for(make_sampler(temp=1.0), is_timed=True) for _ in range(2)]
    one, other = (r.judge(rows(TARGET, 200), None, 0)[0] for r in rules)
    assert not mx.array_equal(one, other).item()


@pytest.mark.parametrize(
    "sampler",
    [
        make_sampler(temp=1.0),
        make_sampler(temp=0.8, top_p=0.9, top_k=5),
        make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.1),
        mx.random.categorical,
    ],
    ids=["temperature", "filters", "xtc", "callable"],
)
def test_a_sampled_text_does_not_depend_on_the_depths(sampler: Any) -> None:
    model, drafter = MarkovChain(0), MarkovChain(1, noise=0.7)

    def text(pattern: Any) -> list[int]:
        mx.random.seed(29)
        with changing_depth(pattern):
            steps = spec_generate_step(
                mx.array([0]),
                model,
                drafter=drafter,
                num_draft_tokens="auto",
                max_tokens=200,
                sampler=sampler,
            )
            return [token for token, *_ in steps]

    texts = [text(pattern) for pattern in [(0,), (1,), (4,), CHANGING]]
    assert texts[1:] == texts[:-1]


def test_xtc_is_asked_in_order_where_time_decides_the_depth() -> None:
    xtc = make_sampler(temp=1.0, xtc_probability=0.5)
    assert isinstance(rule_for(xtc, is_timed=True), ExactMatch)
    assert isinstance(rule_for(xtc), SpeculativeSampling)
    assert isinstance(rule_for(None, is_timed=True), Greedy)


class MarkovChain(nn.Module):
    """A model whose next token depends on the last one alone, by a known table."""

    def __init__(self, seed: int, noise: float = 0.0):
        super().__init__()
        shape = (VOCAB_SIZE, VOCAB_SIZE)
        table = 1.5 * mx.random.normal(shape, key=mx.random.key(5))
        self.table = table + noise * mx.random.normal(shape, key=mx.random.key(seed))
        self.layers: list[nn.Module] = []

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.table[inputs]


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("name", ["recommended", "min-p"])
def test_the_loop_draws_every_token_from_the_distribution_of_the_sampler(
    name: str, num_draft_tokens: int
) -> None:
    mx.random.seed(24)
    model, drafter = MarkovChain(0), MarkovChain(1, noise=0.7)
    stats = SpeculationStats()
    steps = spec_generate_step(
        mx.array([0]),
        model,
        drafter=drafter,
        num_draft_tokens=num_draft_tokens,
        max_tokens=3_000,
        sampler=make_sampler(**SETTINGS[name]),
        stats=stats,
    )
    tokens = np.array([0] + [token for token, *_ in steps])
    assert 0.4 < stats.acceptance_rate < 0.9
    for last in range(VOCAB_SIZE):
        following = tokens[1:][tokens[:-1] == last]
        if len(following) > 100:
            expected = exact(model.table[last][None], SETTINGS[name])
            assert p_value(mx.array(following), expected) > TOLERATED_P_VALUE
