"""Plain and speculative decoding side by side, as commands and benchmarks show them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate

from .decoding import SpeculationStats

PROMPTS = {
    "code": (
        "Write a Python function that merges two sorted lists into one sorted list, "
        "with a docstring and three tests."
    ),
    "prose": (
        "Describe a small harbour town on a winter morning, before the first boats "
        "go out, in about two hundred words."
    ),
    "math": (
        "A train leaves at 9:40 and travels 210 km at 84 km/h; another leaves from the "
        "same place at 10:10 and arrives at the same time. How fast is the second "
        "one? Show each step."
    ),
    "dialogue": (
        "Write a conversation in which a customer returns a broken lamp and the clerk "
        "at first does not believe that it was bought in this shop."
    ),
    "reasoning": (
        "Anna is older than Ben, Carl is younger than Dora, and Ben is older than "
        "Dora. Who is the youngest, and how do you know? Explain it carefully."
    ),
}
NUM_WARM_UP_TOKENS = 8

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Decoded:
    """The outcome of one generation.

    Args:
        tokens (list[int]): Those emitted, the one that ended the text included.
        tps (float): ``generation_tps`` of the last response.
        stats (SpeculationStats, optional): None for plain decoding.
    """

    tokens: list[int]
    tps: float
    stats: SpeculationStats | None = None


@dataclass(frozen=True)
class Difference:
    """Where a greedy output first leaves plain decoding's.

    Args:
        position (int): Of the first token that differs, 0 for the first one emitted.
        margin (float): By how much plain decoding's best logit there exceeds its
          second best.
    """

    position: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """One prompt, decoded greedily without and with speculation.

    Args:
        num_tokens (int): Tokens that plain decoding emitted.
        plain_tps (float): Median decoding speed without speculation, in tokens per
          second.
        speculative_tps (float): The same with it.
        stats (SpeculationStats): Of one generation; all are alike.
        difference (Difference, optional): None if the outputs are identical.
    """

    num_tokens: int
    plain_tps: float
    speculative_tps: float
    stats: SpeculationStats
    difference: Difference | None

    @property
    def is_identical(self) -> bool:
        return self.difference is None

    @property
    def speed_up(self) -> float:
        return self.speculative_tps / self.plain_tps


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a user's message, in the model's chat template if it has one."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def decode(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    max_tokens: int,
    options: Options,
) -> Decoded:
    """Decode once.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): Its tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        max_tokens (int): The most tokens to emit.
        options (Mapping[str, Any]): Of ``stream_generate``; ``mtp`` or ``draft`` among
          them make it speculate.
    """
    tokens = []
    for response in stream_generate(
        model, tokenizer, list(prompt), max_tokens=max_tokens, **options
    ):
        tokens.append(response.token)
    return Decoded(
        tokens, response.generation_tps, getattr(response, "speculation", None)
    )


def warm_up(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], variants: Iterable[Options]
) -> None:
    """Decode a few tokens plainly and in every variant, which also loads drafters."""
    for options in ({}, *variants):
        decode(model, tokenizer, prompt, NUM_WARM_UP_TOKENS, options)


def compare(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    variants: Sequence[Options],
    *,
    max_tokens: int = 128,
    num_repeats: int = 1,
) -> list[Comparison]:
    """Compare greedy decoding with and without speculation, in turns.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): Its tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        variants (Sequence[Mapping[str, Any]]): Options of ``stream_generate``, each
          with ``mtp`` or ``draft``, such as ``{"mtp": True, "num_draft_tokens": 2}``.
        max_tokens (int): The most tokens to emit.
        num_repeats (int): How often to decode plainly, then in each of the variants.

    Returns:
        list[Comparison]: One for each variant.

    Raises:
        SpeculationError: If the model cannot be decoded speculatively.
    """
    runs = [
        [
            decode(model, tokenizer, prompt, max_tokens, options)
            for options in ({}, *variants)
        ]
        for _ in range(num_repeats)
    ]
    plain, *others = runs[0]
    plain_tps, *other_tps = median_tps(runs)
    return [
        Comparison(
            len(plain.tokens),
            plain_tps,
            tps,
            other.stats or SpeculationStats(),
            find_difference(model, tokenizer, prompt, plain.tokens, other.tokens),
        )
        for other, tps in zip(others, other_tps, strict=True)
    ]


def median_tps(runs: Sequence[Sequence[Decoded]]) -> list[float]:
    """Median speeds of repeated runs, one for each that a repeat consists of."""
    return [
        statistics.median(decoded.tps for decoded in repeats)
        for repeats in zip(*runs, strict=True)
    ]


def find_difference(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    plain: Sequence[int],
    other: Sequence[int],
) -> Difference | None:
    """Where two outputs part, and how nearly plain decoding went the other way.

    Plain decoding is repeated up to there, so that the timed runs need not keep a
    vocabulary of log probabilities for each token.
    """
    pairs = zip(plain, other, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return None
    steps = stream_generate(model, tokenizer, list(prompt), max_tokens=position + 1)
    response = next(islice(steps, position, None))
    second, best = mx.sort(mx.topk(response.logprobs, 2).astype(mx.float32)).tolist()
    return Difference(position, best - second)
