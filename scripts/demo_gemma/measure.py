"""What the assistant is worth: agreement on real text, acceptance while generating."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from demo_model.measure import chat_prompts, code_prompts, mean, share_that_ends
from mlx_lm import load, stream_generate

from mlx_optiq_ext.assistants import Assistant, load_assistant
from mlx_optiq_ext.decoding import SpeculationStats
from mlx_optiq_ext.drafters import GemmaAssistantDrafter
from mlx_optiq_ext.mixins.gemma4 import attach_shared_kv

from . import ASSISTANT_FOLDER

_NUM_PROMPTS = 10
_NUM_TOKENS = 128


def measure(folder: Path, streams: Path) -> dict[str, Any]:
    """Measure a pair on held-out text.

    Args:
        folder (Path): The model's, with the assistant's in it.
        streams (Path): The streams.npz that goes with it; chat_prompts.json beside it.

    Returns:
        dict: For `code` and `chat`, `agreement` (the share of positions of real text
        where a draft is the model's own choice, by position in the round), `depth_1`
        and `depth_3` (acceptance by position, tokens a round, tokens per second over
        those of plain decoding, the share of texts that are the same) while generating
        greedily; the share of answers that end.
    """
    model, tokenizer = load(str(folder))
    attach_shared_kv(model)
    assistant = load_assistant(folder / ASSISTANT_FOLDER)
    drafter = GemmaAssistantDrafter(assistant)
    held_out = np.load(streams)
    answers = chat_prompts(streams, tokenizer)
    prompts = {
        "code": list(code_prompts(held_out["code"])),
        "chat": answers[:_NUM_PROMPTS],
    }
    figures: dict[str, Any] = {}
    for kind, each in prompts.items():
        figures[kind] = {"agreement": agreement(model, assistant, held_out[kind])}
        for depth in (1, 3):
            options = {"draft": drafter, "num_draft_tokens": depth}
            pairs = _generate_pairs(model, tokenizer, each, options)
            figures[kind][f"depth_{depth}"] = _summarise(list(pairs))
    figures["answers that end"] = share_that_ends(model, tokenizer, answers[:40])
    return figures


def agreement(
    model: Any,
    assistant: Assistant,
    tokens: np.ndarray,
    *,
    depth: int = 3,
    length: int = 512,
    num_windows: int = 8,
) -> list[float]:
    """Compare the assistant with its model at every position of real text.

    Args:
        model (SharedKVMixin): The model.
        assistant (Assistant): Its assistant.
        tokens (np.ndarray): Held-out tokens, `[num_tokens]`.
        depth (int): How many drafts are made at each position.
        length (int): Of a window.
        num_windows (int): At most so many, evenly spread.
    """
    num_windows = min(num_windows, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, num_windows).astype(int)
    is_right = [
        drafts_are_right
        for start in starts
        for drafts_are_right in _compare(
            model, assistant, mx.array(tokens[start : start + length][None]), depth
        )
    ]
    return [mean(column) for column in zip(*is_right, strict=True)]


def _compare(
    model: Any, assistant: Assistant, window: mx.array, depth: int
) -> Iterator[list[float]]:
    """Yield for each position which of its drafts are the model's choice."""
    # A cache that has seen everything in one pass still has all of it.
    cache = model.make_cache()
    states = model.hidden_states(window, cache)
    choices = model.project(states).argmax(-1)
    shared_kv = model.shared_kv(cache)
    for position in range(1, window.shape[1] - depth):
        visible = assistant.visible(
            {
                kind: tuple(part[:, :, :position] for part in parts)
                for kind, parts in shared_kv.items()
            }
        )
        state = states[:, position - 1 : position]
        drafts = []
        for i in range(position, position + depth):
            embedding = model.embed(window[:, i : i + 1])
            logits, state = assistant(embedding, state, visible, position)
            drafts.append(logits.argmax(-1) == choices[:, i : i + 1])
        yield mx.concatenate(drafts, axis=1)[0].astype(mx.float32).tolist()


def _generate_pairs(
    model: Any, tokenizer: Any, prompts: list[list[int]], options: dict[str, Any]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield what is generated without the options and with them."""
    for prompt in prompts:
        plain, speculative = (
            list(
                stream_generate(
                    model, tokenizer, prompt, max_tokens=_NUM_TOKENS, **each
                )
            )
            for each in ({}, options)
        )
        yield plain, speculative


def _summarise(pairs: list[tuple[list[Any], list[Any]]]) -> dict[str, Any]:
    stats = [speculative[-1].speculation for _, speculative in pairs]
    total = SpeculationStats(
        num_rounds=sum(each.num_rounds for each in stats),
        num_drafted_per_position=_sum(each.num_drafted_per_position for each in stats),
        num_accepted_per_position=_sum(
            each.num_accepted_per_position for each in stats
        ),
    )
    by_position = total.acceptance_rate_per_position
    speed_ups = [
        speculative[-1].generation_tps / plain[-1].generation_tps
        for plain, speculative in pairs
    ]
    are_same = [
        [response.token for response in plain]
        == [response.token for response in speculative]
        for plain, speculative in pairs
    ]
    return {
        "acceptance by position": [round(rate, 3) for rate in by_position],
        "tokens a round": round(total.mean_accepted_length, 2),
        "speed-up": round(float(np.median(speed_ups)), 2),
        "same as plain": mean(are_same),
    }


def _sum(counts: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in itertools.zip_longest(*counts, fillvalue=0)]
