"""What a forward pass over several rows costs, against one over a single row."""

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
    """Time passes over a few rows, the projection to logits included.

    Each pass is built before the clock starts, starts from the same cache and yields
    what plain decoding evaluates: for each row, log probabilities and the best token.

    Args:
        model (nn.Module): The model.
        cache (Sequence[Any]): What the model has seen before; it stays as it is.
        tokens (mx.array): The rows, as many as the largest pass has.
        num_rows (Sequence[int]): Of each kind of pass.
        num_repeats (int): Passes of each kind, in an order that is shuffled.
        clock (Callable[[], float]): Tells seconds.

    Returns:
        dict[int, float]: Median seconds by number of rows.
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
    """A cache that holds a prompt and one token more."""
    cache = make_prompt_cache(model)
    for _ in generate_step(prompt, model, max_tokens=1, prompt_cache=cache):
        pass
    mx.eval([entry.state for entry in cache])
    return cache


def copy_cache(cache: Sequence[Any]) -> list[Any]:
    """The same entries with arrays of their own, which may be updated in place."""
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
