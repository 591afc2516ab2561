"""Lets logits processors see all of a prompt, the cached part included."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ._arguments import Arguments

Processor = Callable[[mx.array, mx.array], mx.array]


def with_cached_tokens(
    processors: list[Processor], arguments: Arguments
) -> list[Processor]:
    """Processors of a request that mlx-lm serves by itself.

    It shows them the part of the prompt that is not in the cache, so that what they do
    would depend on what was served before.

    Args:
        processors (list[Callable]): mlx-lm's.
        arguments (Arguments): The arguments of the request.
    """
    logits = arguments.logits
    num_seen = max(
        logits.repetition_context_size,
        logits.presence_context_size,
        logits.frequency_context_size,
    )

    def cached() -> mx.array:
        # There is no context yet when a generation is only tried.
        context = arguments.inbox.context
        num_cached = 0 if context is None else context.prompt_cache_count
        first = max(num_cached - num_seen, 0)
        tokens = context.prompt[first:num_cached] if num_cached else []
        return mx.array(tokens, mx.int32)

    return [_preceded(processor, cached) for processor in processors]


def _preceded(processor: Processor, cached: Callable[[], mx.array]) -> Processor:
    tokens_before: list[mx.array] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if not tokens_before:
            tokens_before.append(cached())
        return processor(mx.concatenate([*tokens_before, tokens]), logits)

    return process
