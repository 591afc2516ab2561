"""Measure how close the decode loop comes to what the hardware allows.

A model of real shapes has random weights, and a drafter whose acceptance is dialled
knows what plain decoding emits. Acceptance here says nothing
about any trained drafter.

Efficiency is the measured speed-up over mlx-lm's `generate_step`, divided by the
speed-up that the measured costs allow. Allowed is n / sum(c(1 + k) + d(k)): the n
tokens emitted, over what their rounds would take, in passes over one row, if a round
with k draft tokens took a pass over 1 + k rows, c, and drafting, d, and nothing else.
Both are timed by themselves, graphs built beforehand; rolling back, building graphs,
choosing tokens and waiting are the loop's own and not allowed for.

    python scripts/bench_engine.py --preset qwen-400m --depths 1,2,3
    python scripts/bench_engine.py --preset qwen-9b --dtype bfloat16 --bits 4
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from _benchmarks import (
    CLOCKS,
    clock_option,
    markdown_machine,
    markdown_table,
    numbers,
    output_options,
    plot_bars,
    write_results,
)
from engine.drafter import DialledDrafter
from engine.measure import (
    Run,
    Start,
    allowed_seconds,
    measure_draft_seconds,
    measure_rollback_seconds,
    run_plain,
    run_speculative,
    watching_syncs,
)
from engine.models import make_drafter, make_model
from engine.options import Subject, subject_options
from mlx.utils import tree_flatten

from mlx_optiq_ext._costs import filled_cache, measure_verify_seconds
from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.drafters import Drafter

COST_COLUMNS = ("rows", "verify ms", "c", "draft ms", "rollback ms")
SPEED_COLUMNS = (
    "depth",
    "dialled",
    "accepted",
    "tokens/round",
    "plain tok/s",
    "tok/s",
    "speed-up",
    "allowed",
    "efficiency",
    "syncs/round",
    "host ms/round",
    "same tokens",
)


@dataclass(frozen=True)
class Settings:
    """The drafter and the lengths of the measurements."""

    drafter: Drafter | None
    vocab_size: int
    num_tokens: int
    num_repeats: int
    seed: int


@dataclass(frozen=True)
class Costs:
    """Median seconds: of passes by rows, of drafts and rollbacks by draft tokens."""

    verify: dict[int, float]
    draft: dict[int, float]
    rollback: dict[int, float]


@dataclass(frozen=True)
class Result:
    """One depth at one acceptance; every figure is a median over the repeats."""

    depth: int
    dialled_acceptance: float
    acceptance: float
    tokens_per_round: float
    plain_tps: float
    tps: float
    speed_up: float
    allowed_speed_up: float
    efficiency: float
    syncs_per_round: float
    host_ms_per_round: float
    is_identical: bool


@click.command()
@subject_options
@click.option("--depths", default="1,2,3", callback=numbers(int))
@click.option("--acceptance", default="0.8", callback=numbers(float))
@click.option(
    "--draft",
    type=click.Choice(["none", "real"]),
    default="none",
    help="Drafts that cost nothing, or a real head or assistant with random weights.",
)
@click.option("--tokens", default=64, show_default=True)
@click.option("--context", default=300, show_default=True, help="Tokens of the prompt.")
@click.option("--repeats", default=3, show_default=True)
@clock_option
@click.option("--seed", default=0, show_default=True)
@output_options
def main(
    subject: Subject,
    depths: tuple[int, ...],
    acceptance: tuple[float, ...],
    draft: str,
    tokens: int,
    context: int,
    repeats: int,
    clock: str,
    seed: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure the decode loop on a model of real shapes with random weights."""
    model = make_model(subject.preset, subject.weights)
    drafter = None
    if draft == "real":
        drafter = make_drafter(subject.preset, model, subject.weights)
    vocab_size = subject.vocab_size
    prompt = mx.random.randint(0, vocab_size, (context,), key=mx.random.key(seed))
    start = Start(model, filled_cache(model, prompt), prompt, CLOCKS[clock])
    settings = Settings(drafter, vocab_size, tokens, repeats, seed)
    costs = measure_costs(start, settings, depths)
    results = list(measure_speeds(start, settings, costs, depths, acceptance))
    num_parameters = f"{_num_parameters(model) / 1e6:.0f}M"
    title = f"{subject.name}, {num_parameters}, {subject.precision}"
    report = {
        "model": title,
        "draft": draft,
        "clock": clock,
        "machine": describe_machine(),
        "costs": vars(costs),
        "results": list(map(vars, results)),
    }
    write_results(_render(report, costs, results), report, markdown, as_json)
    if plot is not None:
        points = {
            f"depth {r.depth}, {r.acceptance:.0%} accepted": r.efficiency
            for r in results
        }
        plot_bars(plot, points, f"Efficiency, {title}")


def measure_costs(start: Start, settings: Settings, depths: tuple[int, ...]) -> Costs:
    repeats, rows = settings.num_repeats, range(1, 2 + max(depths))
    draft = dict.fromkeys(range(1 + max(depths)), 0.0)
    if settings.drafter is not None:
        for depth in draft:
            draft[depth] = measure_draft_seconds(
                start, settings.drafter, depth, repeats
            )
    return Costs(
        measure_verify_seconds(
            start.model, start.cache, start.tokens, rows, 2 * repeats + 1, start.clock
        ),
        draft,
        {num - 1: measure_rollback_seconds(start, num, repeats) for num in rows[1:]},
    )


def measure_speeds(
    start: Start,
    settings: Settings,
    costs: Costs,
    depths: tuple[int, ...],
    acceptances: tuple[float, ...],
) -> Iterator[Result]:
    plain = partial(run_plain, start, settings.num_tokens)
    script = plain().tokens
    cases = [(depth, acceptance) for depth in depths for acceptance in acceptances]
    with click.progressbar(cases, label="Decoding") as progress:
        for depth, acceptance in progress:
            drafter = DialledDrafter(
                script,
                settings.vocab_size,
                acceptance,
                settings.drafter,
                settings.seed,
            )
            speculative = partial(
                run_speculative, start, settings.num_tokens, drafter, depth
            )
            with watching_syncs() as host:  # This run also warms up.
                watched = speculative()
            pairs = [(plain(), speculative()) for _ in range(settings.num_repeats)]
            yield _result(depth, acceptance, pairs, costs, watched, host)


def _result(
    depth: int,
    acceptance: float,
    pairs: list[tuple[Run, Run]],
    costs: Costs,
    watched: Run,
    host: Any,
) -> Result:
    plain = statistics.median(one.seconds_per_token for one, _ in pairs)
    own = statistics.median(other.seconds_per_token for _, other in pairs)
    run = pairs[0][1]
    num_tokens = len(run.tokens) - 1
    allowed = (
        num_tokens * costs.verify[1] / allowed_seconds(run, costs.verify, costs.draft)
    )
    return Result(
        depth,
        acceptance,
        run.stats.acceptance_rate,
        num_tokens / run.num_rounds,
        1 / plain,
        1 / own,
        plain / own,
        allowed,
        plain / own / allowed,
        host.num_syncs / watched.stats.num_target_calls,
        1e3 * host.busy_seconds / watched.stats.num_target_calls,
        all(one.tokens == other.tokens for one, other in pairs),
    )


def _num_parameters(model: nn.Module) -> int:
    """Count the parameters, those of a quantised model as what they stand for."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def _render(report: dict[str, Any], costs: Costs, results: list[Result]) -> str:
    cost_rows = [
        (
            str(rows),
            f"{1e3 * seconds:.2f}",
            f"{seconds / costs.verify[1]:.2f}",
            f"{1e3 * costs.draft[rows - 1]:.2f}",
            f"{1e3 * costs.rollback.get(rows - 1, 0.0):.2f}",
        )
        for rows, seconds in costs.verify.items()
    ]
    return "\n\n".join(
        [
            f"# {report['model']}, random weights, drafter: {report['draft']}, "
            f"{report['clock']} clock",
            markdown_machine(report["machine"]),
            markdown_table(COST_COLUMNS, cost_rows),
            markdown_table(SPEED_COLUMNS, list(map(_speed_row, results))),
        ]
    )


def _speed_row(result: Result) -> tuple[str, ...]:
    return (
        str(result.depth),
        f"{result.dialled_acceptance:.2f}",
        f"{result.acceptance:.1%}",
        f"{result.tokens_per_round:.2f}",
        f"{result.plain_tps:.2f}",
        f"{result.tps:.2f}",
        f"{result.speed_up:.3f}x",
        f"{result.allowed_speed_up:.3f}x",
        f"{result.efficiency:.3f}",
        f"{result.syncs_per_round:.2f}",
        f"{result.host_ms_per_round:.2f}",
        "yes" if result.is_identical else "no",
    )


if __name__ == "__main__":
    main()
