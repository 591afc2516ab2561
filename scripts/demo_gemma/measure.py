"""What the demo pair is worth: its text, and what the assistant guesses of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_model.measure import (
    DEPTH,
    FIRST_POSITION,
    held_out_texts,
    measure_drafts,
    measure_text,
)
from mlx_lm import load

from mlx_optiq_ext.assistants import Assistant, load_assistant
from mlx_optiq_ext.mixins.gemma4 import attach_shared_kv

from . import ASSISTANT_FOLDER


def measure(folder: Path, work: Path) -> dict[str, Any]:
    """Measure a pair on held-out text.

    Args:
        folder (Path): The model's, with the assistant's in it.
        work (Path): The folder that `demo_model.text.write_streams` wrote to.

    Returns:
        dict: See `demo_model.measure`. An assistant that is not primed sees the model's
        last state and the last keys and values alone.
    """
    model, tokenizer = load(str(folder))
    attach_shared_kv(model)
    assistant = load_assistant(folder / ASSISTANT_FOLDER)

    def compare(model: Any, window: mx.array, is_primed: bool) -> Iterator[list[float]]:
        return _compare(model, assistant, window, is_primed)

    texts = held_out_texts(work)
    return {
        **measure_text(model, tokenizer, texts),
        **measure_drafts(model, tokenizer, texts, compare),
    }


def _compare(
    model: Any, assistant: Assistant, window: mx.array, is_primed: bool
) -> Iterator[list[float]]:
    """Yield for each position which of its drafts are the model's choice."""
    # A cache that has seen everything in one pass still has all of it.
    cache = model.make_cache()
    states = model.hidden_states(window, cache)
    choices = model.project(states).argmax(-1)
    shared_kv = model.shared_kv(cache)
    for position in range(FIRST_POSITION, window.shape[1] - DEPTH):
        rows = slice(0 if is_primed else position - 1, position)
        visible = assistant.visible(
            {
                kind: tuple(part[:, :, rows] for part in parts)
                for kind, parts in shared_kv.items()
            }
        )
        state = states[:, position - 1 : position]
        drafts = []
        for i in range(position, position + DEPTH):
            embedding = model.embed(window[:, i : i + 1])
            logits, state = assistant(embedding, state, visible, position)
            drafts.append(logits.argmax(-1) == choices[:, i : i + 1])
        yield mx.concatenate(drafts, axis=1)[0].astype(mx.float32).tolist()
