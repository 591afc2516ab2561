"""Samplers and logits processors whose failure ends nothing but their own sequence.

Invariant: a step of a batch is never interrupted by what belongs to one of its
sequences. One whose sampler or processor failed goes on without it until whoever asked
for it was told and takes it out of the batch; the others do not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler

Report = Callable[[Exception], None]


class Guard:
    """A sampler or logits processor that reports what it raises, once.

    Args:
        guarded (Callable): The sampler or processor. The decode loop asks the guard for
            it by this name, to know mlx-lm's own functions.
        fallback (Callable): Called in its place after it failed.
        report (Callable): Called with the exception.
    """

    def __init__(
        self,
        guarded: Callable[..., mx.array],
        fallback: Callable[..., mx.array],
        report: Report,
    ):
        self.guarded = guarded
        self._fallback = fallback
        self._report = report
        self._has_failed = False

    def __call__(self, *args: Any) -> mx.array:
        fallback = self._fallback(*args)
        if self._has_failed:
            return fallback
        try:
            return _checked(self.guarded(*args), fallback.shape)
        except Exception as error:
            self.report(error)
            return fallback

    def report(self, error: Exception) -> None:
        """Report an exception, if it is the first one."""
        if not self._has_failed:
            self._has_failed = True
            self._report(error)


def guard_sampler(sampler: Sampler, report: Report) -> Sampler:
    """The sampler, guarded; mlx-lm's greedy one cannot fail and stays as it is."""
    # A batch calls a sampler that all of its rows share once, not for each.
    if sampler is greedy_sampler:
        return sampler
    return Guard(sampler, greedy_sampler, report)


def guard_processors(
    processors: Sequence[LogitsProcessor], report: Report
) -> list[LogitsProcessor]:
    """The logits processors, guarded."""
    return [Guard(processor, _unprocessed, report) for processor in processors]


def _unprocessed(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits


def _checked(found: mx.array, shape: tuple[int, ...]) -> mx.array:
    """What was returned, which has to fit in among that of other sequences.

    Raises:
        ValueError: If it does not.
    """
    if found.shape != shape:
        raise ValueError(
            f"a sampler or logits processor returned shape {found.shape}, expected "
            f"{shape}."
        )
    return found
