"""Measures the cost of a forward pass by the number of its rows."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

Clock = Callable[[], float]


def measure_verify_seconds(
    model: nn.Module,
    cache: Sequence[Any],
    tokens: mx.array,
    num_rows: Sequence[int],
    num_repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[int, float]:
    """Time forward passes over a few rows, including the projection to logits.

    Each pass is built before the clock starts, starts from the same cache and yields
    what plain decoding evaluates: for each row, log probabilities and the best token.

    Args:
        model (nn.Module): The model.
        cache (Sequence[Any]): The prompt cache that every pass starts from. It stays
          as it is.
        tokens (mx.array): The tokens to feed, ``[num_tokens]``, at least as many as
          the largest pass has rows.
        num_rows (Sequence[int]): The numbers of rows to time.
        num_repeats (int): How many passes to time for each number of rows. Their order
          is shuffled.
        clock (Callable[[], float]): Returns the time in seconds.

    Returns:
        dict[int, float]: The median seconds of a pass by its number of rows.
    """
    order = random.Random(0)
    seconds: dict[int, list[float]] = {rows: [] for rows in num_rows}
    for rows in num_rows:  # Every shape is compiled or looked up once.
        _time_pass(model, cache, tokens[:rows], clock)
    for _ in range(num_repeats):
        for rows in order.sample(list(num_rows), len(num_rows)):
            seconds[rows].append(_time_pass(model, cache, tokens[:rows], clock))
    return {rows: statistics.median(values) for rows, values in seconds.items()}


def filled_cache(model: nn.Module, prompt: mx.array) -> list[Any]:
    """Make a cache that holds a prompt and the token generated after it.

    Args:
        model (nn.Module): The model.
        prompt (mx.array): The prompt's tokens, ``[num_tokens]``.
    """
    cache = make_prompt_cache(model)
    for _ in generate_step(prompt, model, max_tokens=1, prompt_cache=cache):
        pass
    mx.eval([entry.state for entry in cache])
    return cache


def copy_cache(cache: Sequence[Any]) -> list[Any]:
    """Copy a cache with its arrays, so that the copy may be updated in place.

    Args:
        cache (Sequence[Any]): The entries of a prompt cache.
    """
    copies = [copy.copy(entry) for entry in cache]
    for entry in copies:
        vars(entry).update(tree_map(_copy_array, vars(entry)))
        mx.eval(entry.state)
    return copies


def _copy_array(value: Any) -> Any:
    return value + 0 if isinstance(value, mx.array) else value


def _time_pass(
    model: nn.Module, cache: Sequence[Any], tokens: mx.array, clock: Clock
) -> float:
    logits = model(tokens[None], cache=copy_cache(cache))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    outputs = mx.argmax(logprobs, axis=-1), logprobs
    start = clock()
    mx.eval(outputs)
    return clock() - start
