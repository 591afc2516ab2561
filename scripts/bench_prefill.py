"""Measure what a drafter adds to the processing of a prompt: time and peak memory.

The models have real shapes and random weights, and so has the head or assistant that
such a model brings along. Prompts are processed plainly, by mlx-lm's
`generate_step`, and with the drafter in turns, up to the first token. An MTP head reads
what the last layer makes of every token, which plain decoding never computes.

    python scripts/bench_prefill.py --preset qwen-400m
    python scripts/bench_prefill.py --preset qwen-9b --dtype bfloat16 --bits 4
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from _benchmarks import (
    CLOCKS,
    clock_option,
    make_report,
    markdown_machine,
    markdown_table,
    numbers,
    output_options,
    plot_bars,
    set_up,
    write_results,
)
from engine.options import Subject, subject_options
from mlx_lm.generate import generate_step

from mlx_optiq_ext import spec_generate_step
from mlx_optiq_ext._costs import Clock

Steps = Callable[[], Iterator[Any]]

COLUMNS = (
    "prompt",
    "plain tok/s",
    "with a drafter",
    "with / plain",
    "peak MB, plain",
    "with a drafter",
)


@dataclass(frozen=True)
class Result:
    """One length of the prompt; rates are medians, their ratio is one of neighbours."""

    num_tokens: int
    plain_tps: float
    own_tps: float
    speed: float
    plain_peak: int
    own_peak: int


@click.command()
@subject_options
@click.option(
    "--prompt-tokens", default="512,2048", show_default=True, callback=numbers(int)
)
@click.option("--repeats", default=5, show_default=True)
@clock_option
@output_options
def main(
    subject: Subject,
    prompt_tokens: tuple[int, ...],
    repeats: int,
    clock: str,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure prefill with a drafter and without, on random weights."""
    model, drafter, prompt = set_up(subject, max(prompt_tokens))
    results = []
    with click.progressbar(prompt_tokens, label="Prefilling") as progress:
        for num_tokens in progress:
            beginning = prompt[:num_tokens]
            plain = partial(generate_step, beginning, model, max_tokens=1)
            own = partial(
                spec_generate_step, beginning, model, drafter=drafter, max_tokens=1
            )
            results.append(measure(plain, own, num_tokens, repeats, CLOCKS[clock]))
    report = make_report(subject, results, clock=clock)
    write_results(render(report, results), report, markdown, as_json)
    if plot is not None:
        bars = {f"{r.num_tokens} tokens": r.speed for r in results}
        plot_bars(plot, bars, f"Prefill with a drafter, {report['model']}")


def measure(
    plain: Steps,
    own: Steps,
    num_tokens: int,
    num_repeats: int,
    clock: Clock,
) -> Result:
    pairs = [
        (_seconds_and_peak(plain, clock), _seconds_and_peak(own, clock))
        for _ in range(num_repeats + 1)
    ][1:]
    return Result(
        num_tokens,
        num_tokens / statistics.median(one[0] for one, _ in pairs),
        num_tokens / statistics.median(other[0] for _, other in pairs),
        statistics.median(one[0] / other[0] for one, other in pairs),
        max(one[1] for one, _ in pairs),
        max(other[1] for _, other in pairs),
    )


def _seconds_and_peak(steps: Steps, clock: Clock) -> tuple[float, int]:
    mx.clear_cache()
    mx.reset_peak_memory()
    start = clock()
    next(steps())
    return clock() - start, mx.get_peak_memory()


def render(report: dict[str, Any], results: list[Result]) -> str:
    rows = [
        (
            str(result.num_tokens),
            f"{result.plain_tps:.1f}",
            f"{result.own_tps:.1f}",
            f"{result.speed:.3f}",
            f"{result.plain_peak / 1e6:.1f}",
            f"{result.own_peak / 1e6:.1f}",
        )
        for result in results
    ]
    return "\n\n".join(
        [
            f"# Prefill, {report['model']}, random weights, {report['clock']} clock",
            markdown_machine(report["machine"]),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
