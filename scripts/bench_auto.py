"""Compare the automatic number of draft tokens with plain decoding and with one.

Whatever share of drafts is right, also none, automatic speculation should be hardly
slower than plain decoding and about as fast as the best fixed number. Every run starts
without knowing what rounds take, as a new process does. Weights are random, and the
acceptance is dialled: it says nothing about any trained drafter.

    python scripts/bench_auto.py --preset qwen-400m
    python scripts/bench_auto.py --preset qwen-4b --dtype bfloat16 --bits 4
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.nn as nn
from _benchmarks import (
    make_report,
    markdown_machine,
    markdown_table,
    numbers,
    output_options,
    plot_bars,
    set_up,
    write_results,
)
from engine.drafter import DialledDrafter
from engine.measure import Run, Start, run_plain, run_speculative
from engine.options import Subject, subject_options

from mlx_optiq_ext._costs import filled_cache
from mlx_optiq_ext._record import record_of

COLUMNS = ("dialled", "plain tok/s", "depth 1", "auto", "calls by depth under auto")


@dataclass(frozen=True)
class Result:
    """Medians at one acceptance; speed-ups are medians of the ratios of neighbours."""

    dialled_acceptance: float
    plain_tps: float
    fixed_speed_up: float
    auto_speed_up: float
    num_calls_per_depth: list[int]


@click.command()
@subject_options
@click.option(
    "--acceptance", default="0,0.5,0.8", show_default=True, callback=numbers(float)
)
@click.option("--tokens", default=256, show_default=True)
@click.option("--context", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--repeats", default=3, show_default=True)
@output_options
def main(
    subject: Subject,
    acceptance: tuple[float, ...],
    tokens: int,
    context: int,
    repeats: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Compare automatic speculation with plain decoding, on random weights."""
    model, drafter, prompt = set_up(subject, context)
    start = Start(model, filled_cache(model, prompt), prompt, time.perf_counter)
    script = run_plain(start, tokens).tokens
    results = []
    with click.progressbar(acceptance, label="Decoding") as progress:
        for rate in progress:
            dialled = DialledDrafter(script, subject.vocab_size, rate, drafter)
            runs = [_in_turns(start, tokens, dialled) for _ in range(repeats + 1)]
            results.append(_result(rate, runs[1:]))
    report = make_report(subject, results, num_tokens=tokens)
    write_results(_render(report, results), report, markdown, as_json)
    if plot is not None:
        bars = {f"{r.dialled_acceptance:.0%} right": r.auto_speed_up for r in results}
        plot_bars(plot, bars, f"Automatic speculation, {report['model']}")


def _in_turns(start: Start, num_tokens: int, drafter: Any) -> tuple[Run, Run, Run]:
    """Decode plainly, with one draft token a round, and automatically."""
    _forget_times(start.model)
    return (
        run_plain(start, num_tokens),
        run_speculative(start, num_tokens, drafter, 1),
        run_speculative(start, num_tokens, drafter, "auto"),
    )


def _forget_times(model: nn.Module) -> None:
    record_of(model).round_times.clear()


def _result(acceptance: float, runs: list[tuple[Run, Run, Run]]) -> Result:
    def speed_up(which: int) -> float:
        return statistics.median(
            run[0].seconds_per_token / run[which].seconds_per_token for run in runs
        )

    plain = statistics.median(run[0].seconds_per_token for run in runs)
    calls = runs[-1][2].stats.num_calls_per_depth
    return Result(acceptance, 1 / plain, speed_up(1), speed_up(2), calls)


def _render(report: dict[str, Any], results: list[Result]) -> str:
    rows = [
        (
            f"{result.dialled_acceptance:.2f}",
            f"{result.plain_tps:.1f}",
            f"{result.fixed_speed_up:.3f}x",
            f"{result.auto_speed_up:.3f}x",
            ", ".join(map(str, result.num_calls_per_depth)),
        )
        for result in results
    ]
    return "\n\n".join(
        [
            f"# {report['model']}, random weights, {report['num_tokens']} tokens",
            markdown_machine(report["machine"]),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
