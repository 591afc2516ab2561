"""Decodes with mlx-optiq: its engine for MTP heads, its generator for assistants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

from ._runner import Decoder, serve


class Engine:
    """The engine for MTP heads, which samples by itself and here ends no text."""

    def __init__(self, folder: Path):
        from optiq.runtime.engine import OptiqEngine

        self._engine = OptiqEngine(str(folder))
        self._engine._eos_ids = set
        self._num_drafted = self._num_accepted = 0

    def steps(
        self,
        prompt: list[int],
        cache: list[Any],
        num_draft_tokens: int,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> Iterator[int]:
        self._num_drafted = self._num_accepted = 0
        events = self._engine.generate_stream(
            "",
            max_tokens=max_tokens,
            depth=num_draft_tokens,
            temperature=sampling["temp"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            prompt_ids=prompt,
            cache=cache,
        )
        try:
            for event in events:
                yield event["token"]
        finally:
            events.close()
            if (stats := self._engine._last_stats) is not None and num_draft_tokens:
                self._num_drafted = stats.drafts_attempted
                self._num_accepted = stats.drafts_accepted

    def counts(self) -> tuple[int, int]:
        return self._num_drafted, self._num_accepted

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self._engine._model)

    def logits(self, tokens: list[int], cache: list[Any]) -> mx.array:
        return self._engine._model(mx.array([tokens]), cache=cache)[0, -1]


class Assisted:
    """The generator for Gemma-4 assistants; plain decoding is mlx-lm's."""

    def __init__(self, folder: Path, draft: Path):
        from optiq.runtime.spec import GemmaAssistantDrafter, SpecStats

        self._model, _ = load_model(folder)
        self._drafter = GemmaAssistantDrafter.from_pretrained(str(draft))
        self._new_stats = SpecStats
        self._stats = SpecStats()

    def steps(
        self,
        prompt: list[int],
        cache: list[Any],
        num_draft_tokens: int,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> Iterator[int]:
        from optiq.runtime.spec import assistant_generate_step

        self._stats = self._new_stats()
        steps = assistant_generate_step(
            mx.array(prompt),
            self._model,
            drafter=self._drafter if num_draft_tokens else None,
            gamma=num_draft_tokens,
            max_tokens=max_tokens,
            sampler=make_sampler(**sampling),
            prompt_cache=cache,
            stats=self._stats,
        )
        try:
            for token, _ in steps:
                yield int(token)
        finally:
            steps.close()

    def counts(self) -> tuple[int, int]:
        return self._stats.n_drafted, self._stats.n_accepted

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self._model)

    def logits(self, tokens: list[int], cache: list[Any]) -> mx.array:
        return self._model(mx.array([tokens]), cache=cache)[0, -1]


def load(folder: Path, draft: Path) -> Decoder:
    return Engine(folder) if draft == folder else Assisted(folder, draft)


if __name__ == "__main__":
    serve(load)
