"""Finds out for `mlx-optiq-ext doctor` whether a model and its drafter work."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import ModelCard
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import get_total_parameters

from .. import _comparing, patches
from .._checkpoints import find_folder
from .._errors import SpeculationError
from .._record import record_of
from ..drafters import (
    DraftModelDrafter,
    GemmaAssistantDrafter,
    MTPDrafter,
    as_drafter,
)
from ..heads import (
    describe_head,
    has_head,
    in_hub_cache,
    may_have_head,
    quantization_of,
)
from ..mixins import attach_mtp
from ._commands import command

Report = dict[str, Any]
Track = Callable[[list[tuple[str, str]]], Iterable[tuple[str, str]]]

MAX_TOKENS = 64
KINDS: dict[type, str] = {
    MTPDrafter: "MTP head",
    GemmaAssistantDrafter: "assistant",
    DraftModelDrafter: "draft model",
}
# Kernels for one row and for several may choose different tokens if the logits are
# closer than this. A larger difference is an error.
NEAR_TIE = 0.7
# Published heads and assistants reach 0.3 to 0.9. A drafter of another model, or with
# norms of the wrong convention, is right by chance only.
MIN_ACCEPTANCE_RATE = 0.1
# A smaller gain cannot be told from noise with one run of each prompt.
MIN_SPEED_UP = 1.05

LOST = "The usual cause is a conversion that left the head out. "
GET_BACK = "To get it back: "
REPLACE = "To put another head in its place: "
USE = "The head of the original model can be used from where it is: "
NO_DRAFTER = (
    "It has no MTP head. Pass --draft PATH: for a Gemma-4 model its -assistant model, "
    "for another one a smaller model with the same tokenizer."
)


def diagnose(
    source: str,
    mtp: str | None,
    draft: str | None,
    num_draft_tokens: int,
    track: Track | None,
) -> Report:
    """Examine a model and its drafter, and try them if nothing stands against it.

    Args:
        source (str): The folder or Hub id of the model.
        mtp (str, optional): The place of the MTP head, if it is not beside the model.
        draft (str, optional): The place of another drafter.
        num_draft_tokens (int): The number of tokens to draft in a round.
        track (Callable, optional): A function that passes on the prompts while they are
          tried, and shows the progress. Without one nothing is tried.

    Returns:
        dict: What is found, and the verdict; it can be written as JSON.
    """
    names = ("model", "drafter", "memory", "test", "problem", "to_do")
    report: Report = dict.fromkeys(names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patches.enable()
            _examine(report, source, mtp, draft, num_draft_tokens, track)
    # A checkpoint can be broken in any way, and all of them have to be reported.
    except Exception as error:
        is_ours = isinstance(error, SpeculationError)
        report["problem"] = (
            str(error) if is_ours else f"{type(error).__name__}: {error}"
        )
    return report | _judge(report)


def _examine(
    report: Report,
    source: str,
    mtp: str | None,
    draft: str | None,
    num_draft_tokens: int,
    track: Track | None,
) -> None:
    folder = find_folder(source)
    model, tokenizer, _ = load(source, lazy=True, return_config=True)
    report["model"] = {"path": str(folder), **_describe_model(model)}
    try:
        drafter = as_drafter(draft, model) if draft else _bind_head(model, mtp)
    except SpeculationError:
        if draft is None and mtp is None:
            report["to_do"] = _how_to_get(model, folder)
        raise
    report["drafter"] = _describe_drafter(drafter, model, mtp, draft)
    report["memory"] = _expect_memory(report, model, draft)
    speculation = {"draft": drafter, "num_draft_tokens": num_draft_tokens}
    if track is not None:
        report["test"] = _try(model, tokenizer, speculation, track)


def _bind_head(model: nn.Module, mtp: str | None) -> Any:
    attach_mtp(model, mtp)
    return MTPDrafter(model)


def _how_to_get(model: nn.Module, folder: Path) -> str:
    """Say what to do about a model whose drafter is missing or unusable."""
    if not may_have_head(model):
        return NO_DRAFTER
    original = _original(folder) or "ORIGINAL"
    is_lost = not _is_head_there(folder)
    cause = LOST if is_lost else ""
    if in_hub_cache(folder):
        return cause + USE + command("--mtp", original)
    words = ("mlx-optiq-ext", "extract-mtp", original, "--into", folder)
    return cause + (GET_BACK if is_lost else REPLACE) + command(*words)


def _is_head_there(folder: Path) -> bool:
    try:
        return has_head(folder)
    except SpeculationError:  # There are files that cannot be read.
        return True


def _original(folder: Path) -> str | None:
    """Read from the model's card which model it was made from, if it says so."""
    try:
        base_model = ModelCard.load(folder / "README.md").data.base_model
    except Exception:  # The model has no card, or one that is not understood.
        return None
    return base_model[0] if isinstance(base_model, list) else base_model


def _describe_model(model: nn.Module) -> Report:
    return {
        "type": getattr(model, "model_type", type(model).__module__),
        "num_layers": len(model.layers),
        **_describe_weights(model),
    }


def _describe_weights(module: nn.Module) -> Report:
    arrays = [array for _, array in tree_flatten(module.parameters())]
    sizes: Counter[str] = Counter()
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[str(array.dtype).removeprefix("mlx.core.")] += array.size
    kinds = Counter(
        f"{x['bits']}-bit {x['mode']}, group size {x['group_size']}"
        for x in quantization_of(module).values()
    )
    return {
        "num_parameters": get_total_parameters(module),
        "num_bytes": sum(array.nbytes for array in arrays),
        "dtype": sizes.most_common(1)[0][0] if sizes else None,
        "quantization": dict(kinds.most_common()),
    }


def _describe_drafter(
    drafter: Any, model: nn.Module, mtp: str | None, draft: str | None
) -> Report:
    head = record_of(model).head
    if head is None:
        modules = [
            x
            for x in vars(drafter).values()
            if isinstance(x, nn.Module) and x is not model
        ]
        weights = _describe_weights(modules[0]) if modules else {}
        kind = KINDS.get(type(drafter), type(drafter).__name__)
        return {"kind": kind, "source": draft, **weights}
    description = asdict(describe_head(record_of(model).head_source or ""))
    description["files"] = [str(file) for file in description["files"]]
    return {
        "kind": KINDS[MTPDrafter],
        "source": draft or mtp or record_of(model).head_source,
        **description,
        **_describe_weights(head),
    }


def _expect_memory(report: Report, model: nn.Module, draft: str | None) -> Report:
    found = {
        "model_bytes": report["model"]["num_bytes"],
        "drafter_bytes": report["drafter"].get("num_bytes", 0),
        "drafter_bytes_per_token": 0,
        "device_bytes": mx.device_info().get("memory_size"),
    }
    if (head := record_of(model).head) is not None:
        attention = head.layers[0].self_attn
        size = attention.num_key_value_heads * attention.head_dim
        found["drafter_bytes_per_token"] = 2 * size * head.norm.weight.itemsize
    needed = found["model_bytes"] + found["drafter_bytes"]
    if (device := found["device_bytes"]) and needed > device:
        report["memory"] = found
        raise SpeculationError(
            f"model and drafter need {needed / 1e9:.1f} GB of memory, this machine has "
            f"{device / 1e9:.1f} GB"
        )
    return found


def _try(
    model: nn.Module, tokenizer: Any, speculation: dict[str, Any], track: Track
) -> Report:
    texts = list(_comparing.PROMPTS.items())
    first = _comparing.chat_prompt(tokenizer, texts[0][1])
    _comparing.warm_up(model, tokenizer, first, [speculation])
    compared = {}
    for name, text in track(texts):
        prompt = _comparing.chat_prompt(tokenizer, text)
        (compared[name],) = _comparing.compare(
            model, tokenizer, prompt, [speculation], max_tokens=MAX_TOKENS
        )
    stats = [x.stats for x in compared.values()]
    num_accepted = sum(x.num_accepted for x in stats)
    return {
        "num_draft_tokens": speculation["num_draft_tokens"],
        "acceptance_rate": num_accepted / max(sum(x.num_drafted for x in stats), 1),
        "mean_accepted_length": 1
        + num_accepted / max(sum(x.num_rounds for x in stats), 1),
        "speed_up": math.prod(x.speed_up for x in compared.values())
        ** (1 / len(compared)),
        "prompts": {name: _describe(x) for name, x in compared.items()},
    }


def _describe(compared: _comparing.Comparison) -> Report:
    difference = compared.difference
    return {
        "num_tokens": compared.num_tokens,
        "plain_tps": compared.plain_tps,
        "speculative_tps": compared.speculative_tps,
        "acceptance_rate": compared.stats.acceptance_rate,
        "difference": None if difference is None else asdict(difference),
    }


def _judge(report: Report) -> Report:
    """Decide whether speculation works and pays here, and say so in one line."""
    if report["test"] is not None:
        return _judge_test(report["test"])
    works = report["problem"] is None
    verdict = (
        "nothing stands against speculation, which was not tried"
        if works
        else "speculation will not work"
    )
    return {"works": works, "pays": None, "verdict": verdict}


def _judge_test(test: Report) -> Report:
    differences = [x["difference"] for x in test["prompts"].values()]
    margin = max((x["margin"] for x in differences if x is not None), default=0.0)
    accepted, speed_up = test["acceptance_rate"], test["speed_up"]
    works = margin <= NEAR_TIE and accepted >= MIN_ACCEPTANCE_RATE
    pays = works and speed_up >= MIN_SPEED_UP
    if margin > NEAR_TIE:
        verdict = (
            "speculation is wrong here: it changes a token that plain decoding prefers "
            f"by {margin:.2f}, which rounding does not explain"
        )
    elif not works:
        verdict = (
            f"speculation will not work: {accepted:.1%} of draft tokens are accepted, "
            "so the drafter is that of another model or damaged"
        )
    else:
        gain = "pays" if pays else "does not pay"
        verdict = (
            f"speculation works {'and' if pays else 'but'} {gain} here: "
            f"{speed_up:.2f}x, measured on built-in prompts"
        )
    return {"works": works, "pays": pays, "verdict": verdict}
