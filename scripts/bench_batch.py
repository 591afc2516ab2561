"""Compare several sequences in one speculative pass with mlx-lm's own batch.

Both generate the same tokens for the same prompts, in turns; ratios are of neighbours.
Weights are random, and the acceptance is dialled: it says nothing about any trained
drafter, but the drafter runs as it would. On mlx's CPU backend, preload OpenBLAS
(`LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1`): without it every row costs a
pass, and nothing can be gained. The machine is named with the results.

    python scripts/bench_batch.py --preset qwen-400m --sequences 2,4,8
    python scripts/bench_batch.py --preset qwen-4b --dtype bfloat16 --depths 2
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
    set_up,
    write_results,
)
from engine.drafter import DialledDrafter
from engine.options import Subject, subject_options
from mlx_lm.generate import BatchGenerator

from mlx_optiq_ext.decoding import SequenceOptions, SpeculativeBatchGenerator
from mlx_optiq_ext.drafters import Drafter

COLUMNS = ("sequences", "depth", "mlx-lm tok/s", "ratio", "least", "most", "accepted")


@dataclass(frozen=True)
class Run:
    """One batch from the first step with all of its sequences to the last token."""

    num_tokens: int
    seconds: float
    acceptance_rate: float | None = None

    @property
    def tps(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True)
class Result:
    """Tokens of all sequences a second; ratios are over mlx-lm's batch."""

    num_sequences: int
    depth: str
    plain_tps: float
    ratios: list[float]
    acceptance_rate: float


@click.command()
@subject_options
@click.option("--sequences", default="2,4,8", show_default=True, callback=numbers(int))
@click.option("--depths", default="1,2,auto", show_default=True)
@click.option("--acceptance", default=0.72, show_default=True)
@click.option("--tokens", default=96, show_default=True)
@click.option("--context", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--repeats", default=3, show_default=True)
@output_options
def main(
    subject: Subject,
    sequences: tuple[int, ...],
    depths: str,
    acceptance: float,
    tokens: int,
    context: int,
    repeats: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Compare speculation for several sequences with mlx-lm's batch."""
    model, drafter, random_tokens = set_up(subject, context)
    prompt = random_tokens.tolist()
    script = _tokens(model, prompt, tokens)
    results = []
    with click.progressbar(sequences, label="Decoding") as progress:
        for number in progress:
            prompts = [prompt] * number
            for depth in depths.split(","):
                dialled = DialledDrafter(
                    script, subject.vocab_size, acceptance, drafter
                )
                pairs = [
                    _in_turns(model, prompts, tokens, dialled, depth)
                    for _ in range(repeats + 1)
                ]
                results.append(_result(number, depth, pairs[1:]))
    report = make_report(subject, results, num_tokens=tokens, acceptance=acceptance)
    write_results(_render(report, results), report, markdown, as_json)


def _tokens(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    generator = BatchGenerator(model, max_tokens=num_tokens)
    generator.insert([prompt])
    found = []
    while responses := generator.next_generated():
        found += [response.token for response in responses]
    return found


def _in_turns(
    model: nn.Module,
    prompts: list[list[int]],
    num_tokens: int,
    drafter: Drafter,
    depth: str,
) -> tuple[Run, Run]:
    plain = BatchGenerator(model, max_tokens=num_tokens)
    own = SpeculativeBatchGenerator(model, drafter=drafter, max_tokens=num_tokens)
    return _run(plain, prompts), _run(own, prompts, depth)


def _run(generator: Any, prompts: list[list[int]], depth: str | None = None) -> Run:
    uids, all_stats = generator.insert(prompts), []
    if depth is not None:
        for uid in uids:
            options = SequenceOptions("auto" if depth == "auto" else int(depth))
            generator.set_options(uid, options)
            all_stats.append(options.stats)
    num_tokens, start = 0, 0.0
    seen: set[int] = set()
    while responses := generator.next_generated():
        if len(seen) < len(uids):
            # The first steps are left out: prompts are processed in between.
            seen |= {response.uid for response in responses}
            start = time.perf_counter()
            continue
        num_tokens += len(responses)
    seconds = time.perf_counter() - start
    generator.close()
    if not all_stats:
        return Run(num_tokens, seconds)
    num_drafted = sum(stats.num_drafted for stats in all_stats)
    num_accepted = sum(stats.num_accepted for stats in all_stats)
    return Run(num_tokens, seconds, num_accepted / max(num_drafted, 1))


def _result(number: int, depth: str, pairs: list[tuple[Run, Run]]) -> Result:
    return Result(
        number,
        depth,
        statistics.median(plain.tps for plain, _ in pairs),
        [own.tps / plain.tps for plain, own in pairs],
        statistics.median(own.acceptance_rate or 0.0 for _, own in pairs),
    )


def _render(report: dict[str, Any], results: list[Result]) -> str:
    rows = [
        (
            str(result.num_sequences),
            result.depth,
            f"{result.plain_tps:.1f}",
            f"{statistics.median(result.ratios):.2f}x",
            f"{min(result.ratios):.2f}x",
            f"{max(result.ratios):.2f}x",
            f"{result.acceptance_rate:.2f}",
        )
        for result in results
    ]
    title = f"# {report['model']}, random weights, {report['num_tokens']} tokens each"
    return "\n\n".join(
        [
            title,
            markdown_machine(report["machine"]),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
