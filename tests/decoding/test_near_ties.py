"""First differences are near-ties where rows depend on how many are computed.

On mlx's CPU backend rows do so in Gemma-4 once a sliding window is full: a pass over
one row reads the window in another order than one over several. With OpenBLAS in place
of the BLAS that mlx brings along they do in every model; OpenBLAS has to be
installed, as with Debian's ``libopenblas0-pthread``, or named by ``OPENBLAS_LIBRARY``.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests import gemma
from tests.decoding import near_ties
from tests.helpers import ScriptedDrafter

ROOT = Path(__file__).parents[2]
PATTERNS = ("*/libopenblas.so.0", "*/openblas*/libopenblas.so.0", "libopenblas.so.0")


def openblas() -> str | None:
    if named := os.environ.get("OPENBLAS_LIBRARY"):
        return named
    found = (path for pattern in PATTERNS for path in Path("/usr/lib").glob(pattern))
    return next(map(str, found), None)


def test_full_windows_make_no_difference_even_among_twins():
    assert near_ties.check("gemma") == 0


@pytest.mark.skipif(platform.system() != "Linux", reason="LD_PRELOAD is of Linux")
@pytest.mark.skipif(openblas() is None, reason="no libopenblas.so.0 is installed")
def test_another_blas_makes_no_other_difference_than_near_ties():
    environment = os.environ | {
        "LD_PRELOAD": openblas(),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.decoding.near_ties", "qwen", "gemma"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert counts["qwen"] > 0
    assert counts["gemma"] > 0


def test_a_cache_that_lacks_a_row_is_seen():
    model = near_ties.model_with_twins("gemma")
    prompt = mx.arange(5, 15)
    drafter = ScriptedDrafter([1] * 16, gemma.VOCAB_SIZE, lambda position: False)
    cache: list[Any] = []
    steps = near_ties.speculate(model, prompt, drafter, 2, cache)
    one_early = itertools.islice(steps, 14)

    def left_early() -> Iterator[Any]:
        yield from one_early
        steps.close()

    error = near_ties.moved(model, prompt, cache, left_early(), 15)
    assert error > 100 * near_ties.ROUNDING
