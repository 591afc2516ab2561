"""Draws random numbers without disturbing the global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global random generator when the block ends.

    The initialisation of layers draws from it, but a seeded generation has to give the
    same text whether or not it loads a drafter, and whoever is decoded beside it.
    """
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
