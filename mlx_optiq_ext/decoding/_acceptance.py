"""Rules that decide which draft tokens the output keeps.

A rule proposes draft tokens from the logits of the drafter and judges each of them
against the target. Whatever the drafter says, the judged tokens have the distribution
that plain decoding gives; under the greedy rule they are the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
from mlx_lm import sample_utils

from .._random_state import random_state_kept

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class DraftToken:
    """A draft token and the distribution that it was drawn from.

    Args:
        token (mx.array): The token, of shape ``[1]``.
        probs (mx.array, optional): The drafter's probabilities, ``[1, vocab_size]``.
          None if the rule does not need them.
    """

    token: mx.array
    probs: mx.array | None = None


class AcceptanceRule(Protocol):
    """A rule that proposes draft tokens and decides whether to accept them.

    Attributes:
        is_stepwise (bool): Whether ``judge`` has side effects. If so, a row may be
          judged only once every earlier draft token is known to be accepted.
    """

    is_stepwise: bool

    def propose(self, logits: mx.array, index: int = 0) -> DraftToken:
        """Choose a draft token.

        Args:
            logits (mx.array): The drafter's logits, ``[1, vocab_size]``.
            index (int): How many tokens are generated before this one.
        """
        ...

    def judge(
        self, logprobs: mx.array, draft: DraftToken | None, index: int = 0
    ) -> tuple[mx.array, mx.array]:
        """Decide on a token after the target has seen its row.

        Args:
            logprobs (mx.array): The target's log probabilities, ``[1, vocab_size]``.
            draft (DraftToken, optional): The draft token for this row, if there is one.
            index (int): How many tokens are generated before this one.

        Returns:
            tuple[mx.array, mx.array]: The token to emit, and whether it is the accepted
            draft token, both of shape ``[1]``.
        """
        ...


class Greedy:
    """Accept a draft token if it is the target's most probable token."""

    is_stepwise = False

    def propose(self, logits: mx.array, index: int = 0) -> DraftToken:
        return DraftToken(sample_utils.greedy_sampler(logits))

    def judge(
        self, logprobs: mx.array, draft: DraftToken | None, index: int = 0
    ) -> tuple[mx.array, mx.array]:
        return _match(sample_utils.greedy_sampler(logprobs), draft)


class ExactMatch:
    """Accept a draft token if a sampler of unknown making draws the same token.

    The sampler is called as plain decoding calls it, once for each emitted token and in
    order, so that its own state advances in the same way.

    Args:
        sampler (Sampler): Whose token counts.
        seed (int, optional): The seed of what the sampler draws from the global
            generator, with the number of tokens before. The generator goes on for
            everybody else as if nothing had been drawn. Default: the sampler draws as
            in plain decoding.
    """

    is_stepwise = True

    def __init__(self, sampler: Sampler, seed: int | None = None):
        self._sampler = sampler
        self._seed = seed

    def propose(self, logits: mx.array, index: int = 0) -> DraftToken:
        return DraftToken(sample_utils.greedy_sampler(logits))

    def judge(
        self, logprobs: mx.array, draft: DraftToken | None, index: int = 0
    ) -> tuple[mx.array, mx.array]:
        return _match(self._drawn(logprobs, index), draft)

    def _drawn(self, logprobs: mx.array, index: int) -> mx.array:
        if self._seed is None:
            return self._sampler(logprobs)
        # The state was set from numbers, so that reading it does not wait for anything.
        with random_state_kept():
            mx.random.seed(self._seed + index)
            return self._sampler(logprobs)


class SpeculativeSampling:
    """Accept draft tokens by rejection sampling, which keeps the target's distribution.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1.

    Args:
        filters (list[Callable]): The filters that mlx-lm's sampler applies in order to
          log probabilities of shape ``[1, vocab_size]``.
        temperature (float): The temperature, which is applied after the filters.
    """

    is_stepwise = False

    def __init__(self, filters: list[Sampler], temperature: float):
        self._filters = filters
        self._inverse_temperature = 1.0 / temperature

    def propose(self, logits: mx.array, index: int = 0) -> DraftToken:
        scaled = self._scale(normalized(logits))
        return DraftToken(mx.random.categorical(scaled), _probs(scaled))

    def judge(
        self, logprobs: mx.array, draft: DraftToken | None, index: int = 0
    ) -> tuple[mx.array, mx.array]:
        scaled = self._scale(logprobs)
        if draft is None or draft.probs is None:
            return _match(mx.random.categorical(scaled), draft)
        # The letters are the paper's: p is the target's distribution, q the draft's.
        p, q, x = _probs(scaled), draft.probs, draft.token[:, None]
        p_x, q_x = (mx.take_along_axis(probs, x, axis=-1)[:, 0] for probs in (p, q))
        is_accepted = mx.random.uniform(shape=p_x.shape) * q_x < p_x
        residual = mx.maximum(p - q, 0)
        # Rounding can leave no residual where p and q agree; it is then never needed.
        residual = mx.where(residual.sum(-1, keepdims=True) > 0, residual, p)
        recovered = mx.random.categorical(mx.log(residual))
        return mx.where(is_accepted, draft.token, recovered), is_accepted

    def _scale(self, logprobs: mx.array) -> mx.array:
        for apply_filter in self._filters:
            logprobs = apply_filter(logprobs)
        return logprobs * self._inverse_temperature


class SharedNoise(SpeculativeSampling):
    """Draw drafts and the target's tokens with the same noise, and accept equal ones.

    The noise of a token depends on nothing but a seed and the number of tokens before
    it. Therefore the text is the same whatever is drafted, and however many tokens.

    Source: Daliri et al. 2024 (arXiv 2408.07978), drafter-invariant speculation; the
    maximum of log probabilities with Gumbel noise has their distribution.
    """

    def __init__(
        self, filters: list[Sampler], temperature: float, seed: int | None = None
    ):
        super().__init__(filters, temperature)
        self._seed = _first_seed(seed)

    def propose(self, logits: mx.array, index: int = 0) -> DraftToken:
        return DraftToken(self._draw(normalized(logits), index))

    def judge(
        self, logprobs: mx.array, draft: DraftToken | None, index: int = 0
    ) -> tuple[mx.array, mx.array]:
        return _match(self._draw(logprobs, index), draft)

    def _draw(self, logprobs: mx.array, index: int = 0) -> mx.array:
        key = mx.random.key(self._seed + index)
        return mx.argmax(
            self._scale(logprobs) + mx.random.gumbel(logprobs.shape, key=key), axis=-1
        )


def _first_seed(seed: int | None) -> int:
    """The seed of a sequence's first token; each of the others has the next number.

    Args:
        seed (int, optional): What was asked for. Default: the global generator decides.
    """
    # Noise of neighbouring seeds would otherwise be the same, one token later.
    key = None if seed is None else mx.random.key(seed)
    high, low = mx.random.randint(0, 1 << 31, (2,), mx.uint32, key=key).tolist()
    return int(high << 31 | low)


def unguarded(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Take a sampler or processor out of the guard that a server put around it, if any.

    Args:
        function (Callable): A sampler or a logits processor.
    """
    return getattr(function, "guarded", function)


def normalized(logits: mx.array) -> mx.array:
    """Compute log probabilities in the way of mlx-lm.

    Args:
        logits (mx.array): Logits, ``[..., vocab_size]``.
    """
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _probs(scaled_logprobs: mx.array) -> mx.array:
    return mx.softmax(scaled_logprobs.astype(mx.float32), axis=-1)


def _match(token: mx.array, draft: DraftToken | None) -> tuple[mx.array, mx.array]:
    return token, mx.array([False]) if draft is None else token == draft.token


def rule_for(
    sampler: Sampler | None,
    is_timed: bool = False,
    seed: int | None = None,
    has_company: bool = False,
) -> AcceptanceRule:
    """Choose the rule with the highest acceptance that is exact for a sampler.

    Args:
        sampler (Sampler, optional): The sampler that mlx-lm's ``generate_step`` takes.
          None means greedy decoding.
        is_timed (bool): Whether the number of drafts depends on the time that they
          take. If so, the random numbers of a token must not depend on that number.
        seed (int, optional): The seed of those random numbers. Default: one from the
          global generator.
        has_company (bool): Whether other sequences may draw random numbers meanwhile.
          If so, no sampler may see what they draw.
    """
    if sampler is None or sampler is sample_utils.greedy_sampler:
        return Greedy()
    settings = _make_sampler_settings(unguarded(sampler))
    if settings is None or (is_timed and any(map(_draws, settings[0]))):
        return ExactMatch(sampler, _first_seed(seed) if has_company else None)
    if is_timed:
        return SharedNoise(*settings, seed)
    return SpeculativeSampling(*settings)


def _draws(apply_filter: Sampler) -> bool:
    """Tell whether one of mlx-lm's filters draws random numbers itself."""
    return "xtc_probability" in inspect.getclosurevars(apply_filter).nonlocals


def _make_sampler_settings(sampler: Sampler) -> tuple[list[Sampler], float] | None:
    """Read the filters and the temperature of a sampler that ``make_sampler`` made.

    mlx-lm does not expose them, so they are read from the variables that the sampler
    closes over. The result is None for a sampler of another making.
    """
    is_known = (
        inspect.isfunction(sampler)
        and sampler.__module__ == sample_utils.__name__
        and sampler.__qualname__ == "make_sampler.<locals>.sampler"
    )
    if not is_known:
        return None
    variables = inspect.getclosurevars(sampler).nonlocals
    if not {"sampling_methods", "temp"} <= variables.keys():
        return None
    return variables["sampling_methods"], variables["temp"]


def is_pure(processor: Callable[[mx.array, mx.array], mx.array]) -> bool:
    """Tell whether a logits processor may be called on tokens that are then rejected.

    The processors of mlx-lm depend on nothing but their arguments. Any other may keep
    state.

    Args:
        processor (Callable): A logits processor, in a server's guard or not.
    """
    module = getattr(unguarded(processor), "__module__", None)
    return module == sample_utils.__name__
