"""Decodes with mlx-vlm, by the generator under its `stream_generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.utils import (
    speculative_stats_since,
    speculative_stats_snapshot,
)
from mlx_vlm.utils import load_model

from ._runner import serve


class MLXVLM:
    def __init__(self, folder: Path, draft: Path):
        self._model = load_model(folder)
        self._drafter, self._kind = load_drafter(str(draft))
        self._before = speculative_stats_snapshot(self._drafter)

    def steps(
        self,
        prompt: list[int],
        cache: list[Any],
        num_draft_tokens: int,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> Iterator[int]:
        self._before = speculative_stats_snapshot(self._drafter)
        options: dict[str, Any] = {}
        if num_draft_tokens:
            options = {
                "draft_model": self._drafter,
                "draft_kind": self._kind,
                "draft_block_size": num_draft_tokens + 1,
            }
        steps = generate_step(
            mx.array([prompt]),
            self._model,
            None,
            None,
            max_tokens=max_tokens,
            temperature=sampling["temp"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            prompt_cache=cache,
            **options,
        )
        try:
            for token, _ in steps:
                yield int(token)
        finally:
            steps.close()

    def counts(self) -> tuple[int, int]:
        _, accepted, drafted = speculative_stats_since(self._drafter, self._before)
        return drafted or 0, accepted or 0  # None if there was no round

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self._model.language_model)

    def logits(self, tokens: list[int], cache: list[Any]) -> mx.array:
        return self._model.language_model(mx.array([tokens]), cache=cache).logits[0, -1]


if __name__ == "__main__":
    serve(MLXVLM)
