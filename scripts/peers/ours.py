"""Decodes with mlx-optiq-ext, and for 0 draft tokens with plain mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from mlx_optiq_ext.drafters import as_drafter

from ._runner import serve


class Ours:
    def __init__(self, folder: Path, draft: Path):
        self._model, _ = load_model(folder)
        self._drafter = as_drafter(None if draft == folder else draft, self._model)
        self._stats = SpeculationStats()

    def steps(
        self,
        prompt: list[int],
        cache: list[Any],
        num_draft_tokens: int,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> Iterator[int]:
        self._stats = SpeculationStats()
        options = {
            "max_tokens": max_tokens,
            "sampler": make_sampler(**sampling),
            "prompt_cache": cache,
        }
        if num_draft_tokens:
            options |= {
                "drafter": self._drafter,
                "num_draft_tokens": num_draft_tokens,
                "stats": self._stats,
            }
        step = spec_generate_step if num_draft_tokens else generate_step
        for token, *_ in step(mx.array(prompt), self._model, **options):
            yield token

    def counts(self) -> tuple[int, int]:
        return self._stats.num_drafted, self._stats.num_accepted

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self._model)

    def logits(self, tokens: list[int], cache: list[Any]) -> mx.array:
        own = cache[: len(self.make_cache())]
        return self._model(mx.array([tokens]), cache=own)[0, -1]


if __name__ == "__main__":
    serve(Ours)
