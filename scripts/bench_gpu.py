"""Measure what speculation gains on a GPU, for models of several shapes.

Weights are random, and the acceptance is dialled: it says nothing about any trained
drafter, but the drafter runs as it would. What is compared runs in turns, with pauses,
because the speed of a host drifts; ratios are of neighbours. Where drafts are always
wrong, the automatic number of draft tokens has to find that out, from nothing.

    python scripts/bench_gpu.py --shapes qwen-4b:4,qwen-4b,qwen-9b,gemma-e4b,qwen-27b:4

A shape is a preset of ``engine/models.py``, in bfloat16, with a number of bits if it is
quantised.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from _benchmarks import (
    markdown_machine,
    markdown_table,
    numbers,
    output_options,
    write_results,
)
from engine.drafter import DialledDrafter
from engine.measure import Run, Start, run_plain, run_speculative
from engine.models import PRESETS, Weights, make_drafter, make_model

from mlx_optiq_ext._costs import filled_cache
from mlx_optiq_ext._options import NumDraftTokens
from mlx_optiq_ext._record import record_of
from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.drafters import Drafter

AUTO: NumDraftTokens = "auto"


@dataclass
class Result:
    """One shape; ratios are over mlx-lm in the same turn.

    Args:
        shape (str): Its name.
        plain_ms (list[float]): Milliseconds a token that mlx-lm took, of every turn.
        ratios (dict): Of every turn, by the number of draft tokens.
        tokens_per_round (dict): By the number of draft tokens.
        wrong (list[float]): Ratios with "auto" where no draft is right.
        is_identical (bool): Whether all runs gave mlx-lm's tokens.
    """

    shape: str
    plain_ms: list[float] = field(default_factory=list)
    ratios: dict[int, list[float]] = field(default_factory=dict)
    tokens_per_round: dict[int, float] = field(default_factory=dict)
    wrong: list[float] = field(default_factory=list)
    is_identical: bool = True


@dataclass(frozen=True)
class Settings:
    """How long it is measured."""

    depths: tuple[int, ...]
    acceptance: float
    num_tokens: int
    num_wrong_tokens: int
    num_turns: int
    pause: float


@click.command()
@click.option("--shapes", default="qwen-4b:4,qwen-4b,qwen-9b", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--depths", default="1,2,3", show_default=True, callback=numbers(int))
@click.option("--acceptance", default=0.72, show_default=True, help="A position.")
@click.option("--tokens", default=128, show_default=True)
@click.option(
    "--wrong-tokens",
    default=512,
    show_default=True,
    help="Tokens where no draft is right; 0 leaves that out.",
)
@click.option("--turns", default=5, show_default=True)
@click.option("--pause", default=0.5, show_default=True, help="Seconds between turns.")
@output_options
def main(
    shapes: str,
    dtype: str,
    depths: tuple[int, ...],
    acceptance: float,
    tokens: int,
    wrong_tokens: int,
    turns: int,
    pause: float,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure what speculation gains on a GPU, for models of several shapes."""
    settings = Settings(depths, acceptance, tokens, wrong_tokens, turns, pause)
    results: list[Result] = []
    for shape in shapes.split(","):
        results.append(measure(shape, dtype, settings))
        click.echo(" | ".join(_row(results[-1], settings)), err=True)
        mx.clear_cache()
    report = {
        "settings": vars(settings),
        "machine": describe_machine(),
        "results": list(map(vars, results)),
    }
    write_results(_render(report, results, settings), report, markdown, as_json)


def measure(shape: str, dtype: str, settings: Settings) -> Result:
    name, _, bits = shape.partition(":")
    preset = PRESETS[name]
    weights = Weights(getattr(mx, dtype), int(bits) if bits else None)
    model = make_model(preset, weights)
    drafter = make_drafter(preset, model, weights)
    vocab_size = preset.config["vocab_size"]
    prompt = mx.random.randint(0, vocab_size, (64,), key=mx.random.key(0))
    start = Start(model, filled_cache(model, prompt), prompt, time.perf_counter)
    result = Result(f"{name}, {bits + ' bits' if bits else dtype}")
    _measure_depths(start, drafter, vocab_size, settings, result)
    if settings.num_wrong_tokens:
        _measure_wrong(start, drafter, vocab_size, settings, result)
    return result


def _measure_depths(
    start: Start,
    drafter: Drafter,
    vocab_size: int,
    settings: Settings,
    result: Result,
) -> None:
    number = settings.num_tokens
    script = run_plain(start, number).tokens
    dialled = DialledDrafter(script, vocab_size, settings.acceptance, drafter)
    for turn in range(settings.num_turns + 1):  # The first compiles and is left out.
        plain = run_plain(start, number)
        if turn:
            result.plain_ms.append(1e3 * plain.seconds_per_token)
        for depth in settings.depths:
            run = run_speculative(start, number, dialled, depth)
            _compare(result, plain, run, depth if turn else None)
        time.sleep(settings.pause)


def _measure_wrong(
    start: Start,
    drafter: Drafter,
    vocab_size: int,
    settings: Settings,
    result: Result,
) -> None:
    number = settings.num_wrong_tokens
    script = run_plain(start, number).tokens
    never = DialledDrafter(script, vocab_size, 0.0, drafter)
    for _ in range(settings.num_turns):
        _forget(start.model)
        plain = run_plain(start, number)
        run = run_speculative(start, number, never, AUTO)
        result.is_identical &= plain.tokens == run.tokens
        result.wrong.append(plain.seconds / run.seconds)
        time.sleep(settings.pause)


def _forget(model: nn.Module) -> None:
    """Let a run start without knowing what rounds take, as a new process does."""
    record_of(model).round_times.clear()


def _compare(result: Result, plain: Run, run: Run, depth: int | None) -> None:
    result.is_identical &= plain.tokens == run.tokens
    if depth is not None:
        ratio = plain.seconds_per_token / run.seconds_per_token
        result.ratios.setdefault(depth, []).append(ratio)
        result.tokens_per_round[depth] = (len(run.tokens) - 1) / run.num_rounds


def _render(report: dict[str, Any], results: list[Result], settings: Settings) -> str:
    columns = (
        "shape",
        "mlx-lm, ms a token",
        *(f"{depth} draft tokens" for depth in settings.depths),
        "drafts always wrong, auto",
        "same tokens",
    )
    rows = [_row(result, settings) for result in results]
    return "\n\n".join(
        [
            f"# Speculation over mlx-lm, random weights, {settings.acceptance} of the "
            f"drafts accepted at each position, {settings.num_tokens} tokens; medians "
            f"of {settings.num_turns} turns (least to most)",
            markdown_machine(report["machine"]),
            markdown_table(columns, rows),
        ]
    )


def _row(result: Result, settings: Settings) -> tuple[str, ...]:
    return (
        result.shape,
        f"{statistics.median(result.plain_ms):.1f}",
        *(_ratio(result.ratios[depth]) for depth in settings.depths),
        _ratio(result.wrong) if result.wrong else "",
        "yes" if result.is_identical else "no",
    )


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
