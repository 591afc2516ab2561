"""What the head is worth: agreement on real text, acceptance while generating."""

from __future__ import annotations

import itertools
import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load, stream_generate

from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp

from .text import END_OF_TEXT, SPECIAL_TOKENS

_NUM_PROMPTS = 10
_NUM_PROMPT_TOKENS = 200
_NUM_TOKENS = 128
_MAX_ANSWER = 300


def measure(folder: Path, streams: Path) -> dict[str, Any]:
    """Measure a model on held-out text.

    Args:
        folder (Path): The model's.
        streams (Path): The streams.npz that goes with it; chat_prompts.json beside it.

    Returns:
        dict: For `code` and `chat`, `agreement` (the shares of positions of real text
        where the draft is the model's own choice, and the mean overlap of the two
        distributions), `depth_1` and `depth_3` (acceptance by position, tokens a round)
        while generating; plain tokens per second; the share of answers that end.
    """
    model, tokenizer = load(str(folder))
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    attach_mtp(model, folder)
    held_out = np.load(streams)
    answers = chat_prompts(streams, tokenizer)
    prompts = {
        "code": list(code_prompts(held_out["code"])),
        "chat": answers[:_NUM_PROMPTS],
    }
    figures: dict[str, Any] = {}
    for kind, each in prompts.items():
        texts = [_generate(model, tokenizer, prompt) for prompt in each]
        figures[kind] = {"agreement": agreement(model, held_out[kind])}
        for depth in (1, 3):
            rounds = [
                round_
                for prompt, tokens in zip(each, texts, strict=True)
                for round_ in simulate(model, prompt, tokens, depth)
            ]
            figures[kind][f"depth_{depth}"] = _summarise(rounds, depth)
    figures["plain tokens per second"] = _speed(model, tokenizer, prompts["code"])
    figures["answers that end"] = share_that_ends(model, tokenizer, answers[:40])
    return figures


def agreement(
    model: Any, tokens: np.ndarray, *, length: int = 512, num_windows: int = 40
) -> dict[str, float]:
    """Compare the head with its model at every position of real text.

    Args:
        model (MTPMixin): With its head attached.
        tokens (np.ndarray): Held-out tokens, `[num_tokens]`.
        length (int): Of a window.
        num_windows (int): At most so many, evenly spread.
    """
    num_windows = min(num_windows, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, num_windows).astype(int)
    greedy, overlap = [], []
    for start in starts:
        window = mx.array(tokens[None, start : start + length + 1].astype(np.int32))
        hidden = model.hidden_states(window[:, :-1])
        drafts = model.project(model.mtp(model.embed(window[:, 1:]), hidden))[:, :-1]
        own = model.project(hidden)[:, 1:]
        greedy.append((drafts.argmax(-1) == own.argmax(-1)).mean().item())
        both = mx.minimum(mx.softmax(drafts, -1), mx.softmax(own, -1))
        overlap.append(both.sum(-1).mean().item())
    return {"greedy": mean(greedy), "overlap at temperature 1": mean(overlap)}


def simulate(
    model: Any, prompt: list[int], tokens: list[int], depth: int
) -> Iterator[int]:
    """Replay a greedy generation in rounds and yield the drafts accepted in each.

    What speculation writes is what was written without, so the rounds can be told from
    the finished text: a draft is accepted if it is what the text has there.

    Args:
        model (MTPMixin): With its head attached.
        prompt (list): Its tokens.
        tokens (list): What the model wrote.
        depth (int): How many tokens a round drafts.
    """
    text = mx.array([prompt + tokens])
    hidden = model.hidden_states(text[:, :-1])
    embeddings = model.embed(text[:, 1:])
    cache, _ = model.make_mtp_cache()
    num_seen = 0
    last = len(prompt)
    while last + depth < text.shape[1]:
        # Everything up to `last`, which the target has just chosen, is committed.
        rows = slice(num_seen, last)
        state = model.mtp(embeddings[:, rows], hidden[:, rows], cache)[:, -1:]
        num_seen = last
        drafts = [model.project(state).argmax(-1)]
        for _ in range(depth - 1):
            state = model.mtp(model.embed(drafts[-1]), state, cache)
            drafts.append(model.project(state).argmax(-1))
        cache.trim(depth - 1)
        is_right = mx.concatenate(drafts, axis=1) == text[:, last + 1 :][:, :depth]
        num_accepted = int(is_right.astype(mx.int32).cumprod(axis=1).sum().item())
        yield num_accepted
        last += num_accepted + 1


def _summarise(rounds: list[int], depth: int) -> dict[str, Any]:
    reached = [sum(accepted >= i for accepted in rounds) for i in range(depth + 1)]
    by_position = [
        round(passed / max(1, tried), 3)
        for tried, passed in itertools.pairwise(reached)
    ]
    tokens_a_round = 1 + sum(rounds) / len(rounds)
    return {
        "acceptance by position": by_position,
        "tokens a round": round(tokens_a_round, 2),
    }


def code_prompts(tokens: np.ndarray) -> Iterator[list[int]]:
    """Yield the beginnings of some files of a held-out stream."""
    starts = np.flatnonzero(tokens == END_OF_TEXT)
    for start in starts[:: len(starts) // _NUM_PROMPTS][:_NUM_PROMPTS]:
        yield tokens[start + 1 : start + 1 + _NUM_PROMPT_TOKENS].tolist()


def chat_prompts(streams: Path, tokenizer: Any) -> list[list[int]]:
    """Read the held-out prompts beside streams.npz, up to where the answer begins."""
    prompts = json.loads((streams.parent / "chat_prompts.json").read_text())
    start_of_answer = f"{SPECIAL_TOKENS[1]}assistant\n"
    return [tokenizer.encode(prompt + start_of_answer) for prompt in prompts]


def _generate(model: Any, tokenizer: Any, prompt: list[int]) -> list[int]:
    responses = stream_generate(model, tokenizer, prompt, max_tokens=_NUM_TOKENS)
    return [response.token for response in responses]


def _speed(model: Any, tokenizer: Any, prompts: list[list[int]]) -> float:
    speeds = []
    for prompt in prompts:
        *_, last = stream_generate(model, tokenizer, prompt, max_tokens=_NUM_TOKENS)
        speeds.append(last.generation_tps)
    return round(statistics.median(speeds), 1)


def share_that_ends(model: Any, tokenizer: Any, prompts: list[list[int]]) -> float:
    """Measure how many greedy answers end by themselves."""
    reasons = []
    for prompt in prompts:
        *_, last = stream_generate(model, tokenizer, prompt, max_tokens=_MAX_ANSWER)
        reasons.append(last.finish_reason)
    return round(reasons.count("stop") / len(reasons), 3)


def mean(values: Sequence[float]) -> float:
    """Return the mean as it is printed."""
    return round(statistics.fmean(values), 4)
