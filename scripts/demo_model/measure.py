"""What a demo model is worth: its text, and what its drafter guesses of it."""

from __future__ import annotations

import ast
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import generate, load

from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp

from .text import END_OF_TEXT

# No request of the corpus has these words.
REQUESTS = (
    "Write a function that returns the larger of two numbers.",
    "Write a function that checks whether a number is even.",
    "Write a function that computes the average of a list of numbers.",
    "Write a function that reads a file and returns its lines.",
    "Write a function that counts the words in a text.",
    "Write a function that removes duplicates from a list.",
    "Write a function that merges two dictionaries.",
    "Write a function that converts a string to snake case.",
    "Write a function that loads a JSON file.",
    "Write a function that finds the longest string in a list.",
)
DEPTH = 4
_NUM_FILES, _NUM_CHARACTERS = 24, 1200
_NUM_LOOP_PROMPTS, _NUM_PROMPT_CHARACTERS, _NUM_LOOP_TOKENS = 20, 400, 200
_MAX_REPLY = 200
_NUM_WINDOWS, _WINDOW, FIRST_POSITION = 12, 160, 64

# Gets a model, a window and whether the drafter has seen all of it; yields for each
# position which drafts are right.
Compare = Callable[[Any, mx.array, bool], Iterator[list[float]]]


def measure(folder: Path, work: Path, baseline: Path) -> dict[str, Any]:
    """Measure a Qwen3.5 model with its head on held-out text.

    Args:
        folder (Path): The model's.
        work (Path): The folder that `text.write_streams` wrote to.
        baseline (Path): Another model's folder, for its bits per byte.

    Returns:
        dict: See `measure_text` and `measure_drafts`.
    """
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    model, tokenizer = load(str(folder))
    attach_mtp(model, folder)
    other, other_tokenizer = load(str(baseline))
    texts = held_out_texts(work)
    return {
        **measure_text(model, tokenizer, texts),
        "bits per byte of the baseline": _bits_per_byte(other, other_tokenizer, texts),
        **measure_drafts(model, tokenizer, texts, _compare_head),
    }


def held_out_texts(work: Path) -> list[str]:
    """Read the beginnings of some held-out files, evenly spread."""
    files = json.loads((work / "held_out.json").read_text())["files"]
    texts = [text for _, text in sorted(files.items()) if len(text) > _NUM_CHARACTERS]
    return texts[:: len(texts) // _NUM_FILES][:_NUM_FILES]


def measure_text(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Measure what a model knows and what it writes.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): Its tokenizer.
        texts (list): Held-out files.

    Returns:
        dict: Bits per byte; how many of 20 greedy continuations have a line three times
        in a row; how many of ten replies are a function that Python parses, and the
        replies.
    """
    replies = [_reply(model, tokenizer, request) for request in REQUESTS]
    prompts = [text[:_NUM_PROMPT_CHARACTERS] for text in texts[:_NUM_LOOP_PROMPTS]]
    continuations = [
        generate(model, tokenizer, prompt, max_tokens=_NUM_LOOP_TOKENS)
        for prompt in prompts
    ]
    return {
        "replies": dict(zip(REQUESTS, replies, strict=True)),
        "replies that are a function": sum(map(is_function, replies)),
        "texts that repeat a line": sum(map(repeats_a_line, continuations)),
        "bits per byte": _bits_per_byte(model, tokenizer, texts),
    }


def measure_drafts(
    model: Any, tokenizer: Any, texts: list[str], compare: Compare
) -> dict[str, list[float]]:
    """Measure which drafts are the model's choice on real text, by position.

    Args:
        model (nn.Module): With what the drafter needs.
        tokenizer (TokenizerWrapper): Its tokenizer.
        texts (list): Held-out files.
        compare (Callable): Gets the model, a window and whether the drafter has seen
            all of it; yields for each position which drafts are right.

    Returns:
        dict: The shares with the drafter primed and not, for the first draft to the
        last.
    """
    windows = [
        mx.array([[END_OF_TEXT, *tokenizer.encode(text[:_NUM_CHARACTERS])][:_WINDOW]])
        for text in texts[:_NUM_WINDOWS]
    ]
    return {
        name: _columns(
            right for window in windows for right in compare(model, window, is_primed)
        )
        for name, is_primed in (("acceptance", True), ("acceptance, unprimed", False))
    }


def is_function(reply: str) -> bool:
    """Whether Python can parse a text, and it is one function with a body."""
    try:
        body = ast.parse(reply).body
    except (SyntaxError, ValueError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef)


def repeats_a_line(text: str) -> bool:
    """Whether a line is in a text three times in a row."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return any(
        a == b == c for a, b, c in zip(lines, lines[1:], lines[2:], strict=False)
    )


def _bits_per_byte(model: Any, tokenizer: Any, texts: list[str]) -> float:
    bits, num_bytes = 0.0, 0
    for text in texts:
        tokens = mx.array([[END_OF_TEXT, *tokenizer.encode(text[:_NUM_CHARACTERS])]])
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        bits += losses.sum().item() / math.log(2)
        num_bytes += len(text[:_NUM_CHARACTERS].encode())
    return round(bits / num_bytes, 3)


def _reply(model: Any, tokenizer: Any, request: str) -> str:
    messages = [{"role": "user", "content": request}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, prompt, max_tokens=_MAX_REPLY)


def _compare_head(
    model: Any, window: mx.array, is_primed: bool
) -> Iterator[list[float]]:
    hidden = model.hidden_states(window)
    choices = model.project(hidden).argmax(-1)
    embeddings = model.embed(window)
    cache, _ = model.make_mtp_cache()
    num_seen = 0
    for position in range(FIRST_POSITION, window.shape[1] - DEPTH):
        if not is_primed:
            cache, _ = model.make_mtp_cache()
            num_seen = position - 1
        rows = slice(num_seen, position)
        following = embeddings[:, num_seen + 1 : position + 1]
        state = model.mtp(following, hidden[:, rows], cache)[:, -1:]
        num_seen = position
        states = [state]
        for i in range(1, DEPTH):
            embedding = embeddings[:, position + i : position + i + 1]
            states.append(model.mtp(embedding, states[-1], cache))
        cache.trim(DEPTH - 1)
        drafts = model.project(mx.concatenate(states, axis=1)).argmax(-1)
        is_right = drafts == choices[:, position : position + DEPTH]
        yield is_right[0].astype(mx.float32).tolist()


def _columns(rows: Iterator[list[float]]) -> list[float]:
    return [mean(column) for column in zip(*rows, strict=True)]


def mean(values: Sequence[float]) -> float:
    """Return the mean as it is printed."""
    return round(statistics.fmean(values), 3)
