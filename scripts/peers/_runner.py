"""Runs one decoder: requests come on stdin and replies go to stdout, in JSON.

The process runs in the decoder's environment, which has MLX and not this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

PROBE = 5  # the token that is fed to a cache to see what is in it


class Decoder(Protocol):
    """A model, its drafter and a way to decode with them."""

    def steps(
        self,
        prompt: list[int],
        cache: list[Any],
        num_draft_tokens: int,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> Iterator[int]:
        """Yield tokens, which end no text; 0 draft tokens mean plain decoding."""
        ...

    def counts(self) -> tuple[int, int]:
        """Return the tokens drafted and accepted by the last ``steps``."""
        ...

    def make_cache(self) -> list[Any]: ...

    def logits(self, tokens: list[int], cache: list[Any]) -> mx.array:
        """Compute the logits after the last token, without speculation."""
        ...


class Request(NamedTuple):
    """One generation that a decoder is asked for.

    Args:
        prompt (list[int]): The tokens of the prompt.
        num_draft_tokens (int): The number of draft tokens in a round, 0 for plain
          decoding.
        max_tokens (int): The limit that the decoder is told.
        sampling (dict): The values of ``temp``, ``top_p`` and ``top_k``.
        seed (int): The seed of the sampler.
        stop_after (int, optional): The number of tokens after which to leave the
          decoder.
        inspects (bool): Whether to look into the cache afterwards.
    """

    prompt: list[int]
    num_draft_tokens: int
    max_tokens: int
    sampling: dict[str, float]
    seed: int = 0
    stop_after: int | None = None
    inspects: bool = False


def serve(load: Callable[[Path, Path], Decoder]) -> None:
    """Load the checkpoints that the command line names, and answer requests.

    Args:
        load (Callable): A function that makes the decoder of a model and a drafter.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Libraries print there.
    with replies:
        for reply in _replies(load):
            print(json.dumps(reply), file=replies, flush=True)


def _replies(load: Callable[[Path, Path], Decoder]) -> Iterator[dict[str, Any]]:
    try:
        decoder = load(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as exc:
        yield _failure(exc)
        return
    yield {"mlx": mx.__version__}
    for line in sys.stdin:
        try:
            yield run(decoder, Request(**json.loads(line)))
        except Exception as exc:
            yield _failure(exc)


def _failure(exc: Exception) -> dict[str, Any]:
    traceback.print_exc()
    return {"error": f"{type(exc).__name__}: {exc}"}


def run(decoder: Decoder, request: Request) -> dict[str, Any]:
    """Decode once, and time it from the first token to the last.

    The seconds of the processor, which are those of all threads, are less disturbed by
    other programs than those of the clock.

    Args:
        decoder (Decoder): The decoder.
        request (Request): The generation.

    Returns:
        dict: The tokens, seconds, counts, and what ``inspect`` found, if it was asked.
    """
    mx.random.seed(request.seed)
    cache = decoder.make_cache()
    steps = decoder.steps(
        request.prompt,
        cache,
        request.num_draft_tokens,
        request.max_tokens,
        request.sampling,
    )
    tokens, times = [], []
    for token in steps:
        times.append((time.perf_counter(), time.process_time()))
        tokens.append(token)
        if len(tokens) == request.stop_after:
            break
    steps.close()  # type: ignore[attr-defined]
    drafted, accepted = decoder.counts()
    seconds, processor_seconds = (
        b - a for a, b in zip(times[0], times[-1], strict=True)
    )
    return {
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "drafted": drafted,
        "accepted": accepted,
        "cache": (
            inspect(decoder, cache, request.prompt + tokens)
            if request.inspects
            else None
        ),
    }


def inspect(decoder: Decoder, cache: list[Any], tokens: list[int]) -> dict[str, Any]:
    """Compare the contents of a cache with the tokens that it should hold.

    Args:
        decoder (Decoder): The decoder that used the cache.
        cache (list): The cache as decoding left it.
        tokens (list[int]): The tokens that it should hold.

    Returns:
        dict: ``num_extra``, negative if some are missing, and ``error``, the largest
        difference of logits after one more token to those of a cache that holds as many
        tokens; None if it holds tokens that were never yielded.
    """
    num_held = max(int(getattr(entry, "offset", 0) or 0) for entry in cache)
    num_extra = num_held - len(tokens)
    if num_extra > 0:
        return {"num_extra": num_extra, "error": None}
    fresh = decoder.make_cache()
    held = tokens[: len(tokens) + num_extra]
    decoder.logits(held, fresh)
    found, expected = (decoder.logits([PROBE], entries) for entries in (cache, fresh))
    return {"num_extra": num_extra, "error": mx.abs(found - expected).max().item()}
