"""Compares plain and speculative decoding for commands and benchmarks."""

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
        tokens (list[int]): The tokens emitted, with the one that ended the text.
        tps (float): The decoding speed in tokens per second, as mlx-lm reports it.
        stats (SpeculationStats, optional): The counts of speculation. None if the
          decoding was plain.
    """

    tokens: list[int]
    tps: float
    stats: SpeculationStats | None = None


@dataclass(frozen=True)
class Difference:
    """The first token at which a greedy output differs from plain decoding.

    Args:
        position (int): The position of that token; the first one emitted has 0.
        margin (float): The difference between the best and the second best logit of
          plain decoding at that position.
    """

    position: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """One prompt, decoded greedily without and with speculation.

    Args:
        num_tokens (int): The number of tokens that plain decoding emitted.
        plain_tps (float): The median speed without speculation, in tokens per second.
        speculative_tps (float): The median speed with speculation, in tokens per
          second.
        stats (SpeculationStats): The counts of the first speculative generation; the
          others have the same.
        difference (Difference, optional): Where the outputs differ. None if they are
          identical.
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
    """Encode a user's message, in the model's chat template if there is one.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        text (str): What the user says.
    """
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
    """Decode a prompt once, with or without speculation.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        max_tokens (int): The most tokens to emit.
        options (Mapping[str, Any]): Arguments of ``stream_generate``; it speculates if
          ``mtp`` or ``draft`` is among them.
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
    """Decode a few tokens plainly and in every variant, which also loads drafters.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        variants (Iterable[Mapping[str, Any]]): The options of each variant.
    """
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
        tokenizer (TokenizerWrapper): The model's tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        variants (Sequence[Mapping[str, Any]]): Options of ``stream_generate``, each
          with ``mtp`` or ``draft``, such as ``{"mtp": True, "num_draft_tokens": 2}``.
        max_tokens (int): The most tokens to emit.
        num_repeats (int): How often to decode plainly, then in each of the variants.

    Returns:
        list[Comparison]: One comparison for each variant.

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
    """Compute the median speed of each run over its repeats, in tokens per second.

    Args:
        runs (Sequence[Sequence[Decoded]]): For each repeat, the outcomes of its runs,
          always in the same order.
    """
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
    """Find where two outputs differ, and how close plain decoding's choice was there.

    Plain decoding is repeated up to that token, so that the timed runs need not keep
    the log probabilities of the whole vocabulary for each token.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        prompt (Sequence[int]): The prompt's tokens.
        plain (Sequence[int]): The tokens of plain decoding.
        other (Sequence[int]): The tokens of the output that is compared with it.

    Returns:
        Difference, optional: None if neither output differs before the other ends.
    """
    pairs = zip(plain, other, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return None
    steps = stream_generate(model, tokenizer, list(prompt), max_tokens=position + 1)
    response = next(islice(steps, position, None))
    second, best = mx.sort(mx.topk(response.logprobs, 2).astype(mx.float32)).tolist()
    return Difference(position, best - second)
