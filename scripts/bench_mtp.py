"""Measure models with an MTP head as the published table of mlx-optiq does.

Each measurement runs in a process of its own and answers one question about Python,
which has 166 tokens in the vocabulary of earlier Qwen models; results say how many it
has. Speeds are `GenerationResponse.generation_tps`, greedy and with the sampling that
the model's `generation_config.json` recommends. Plain and speculative measurements
alternate.

    python scripts/bench_mtp.py                       # the embedded demo model
    python scripts/bench_mtp.py --model Qwen/Qwen3.5-9B --plot speed.png
"""

from __future__ import annotations

import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from _benchmarks import (
    markdown_machine,
    markdown_table,
    output_options,
    plot_bars,
    write_results,
)

from mlx_optiq_ext.cli.demo import MODEL

QUESTION = """\
I have a Python service that reads log files of several gigabytes, and it is too
slow. Each line has a time stamp, a level, the name of a component and a message,
separated by tabs. Write a function that takes the path of such a file and returns,
for each component, the number of lines of each level and the longest gap between two
lines that follow each other. It must not hold the whole file in memory, must skip and
count lines that are malformed, and must accept files that are compressed with gzip.
Use only the standard library, add type annotations and a docstring, and write three
tests with pytest: one for an empty file, one for a malformed line in the middle, and
one for a gap across midnight. Explain which part takes most time.
"""
COLUMNS = ("Model", "Base tok/s", "MTP tok/s", "Speedup", "Acceptance")
SAMPLINGS = ("greedy", "recommended")


@dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Args:
        model (str): A folder or a Hub id.
        sampling (str): ``"greedy"`` or ``"recommended"``.
        options (dict): Of ``stream_generate``; none for plain decoding.
        num_tokens (int): The most tokens to emit.
    """

    model: str
    sampling: str
    options: dict[str, Any]
    num_tokens: int

    def run(self) -> dict[str, Any]:
        """Measure, in this process."""
        import mlx.core as mx
        from mlx_lm import load

        from mlx_optiq_ext._comparing import chat_prompt, decode, warm_up

        warnings.filterwarnings("ignore", message="Speculation with an MTP head")
        model, tokenizer = load(self.model)
        prompt = chat_prompt(tokenizer, QUESTION)
        options = dict(self.options)
        if self.sampling == "recommended":
            options["sampler"] = recommended_sampler(model)
        warm_up(model, tokenizer, prompt, [options])
        mx.random.seed(0)
        decoded = decode(model, tokenizer, prompt, self.num_tokens, options)
        return {
            "question_tokens": len(tokenizer.encode(QUESTION)),
            "prompt_tokens": len(prompt),
            "tokens": len(decoded.tokens),
            "tps": decoded.tps,
            "acceptance": decoded.stats and decoded.stats.acceptance_rate,
        }


def recommended_sampler(model: Any) -> Any:
    """Make the sampler that a model recommends; greedy if it recommends none."""
    from mlx_lm.sample_utils import make_sampler

    from mlx_optiq_ext._record import record_of
    from mlx_optiq_ext.serving._sampling import SAMPLING, read_recommended

    found = read_recommended(record_of(model).source)
    settings = {name: found[name] for name in SAMPLING if name in found}
    return make_sampler(temp=settings.pop("temperature", 0.0), **settings)


@click.command()
@click.option("--model", "models", multiple=True, help="A folder or a Hub id.")
@click.option("--mtp", help="The head, if it is not with the model.")
@click.option(
    "--sampling",
    "samplings",
    type=click.Choice(SAMPLINGS),
    multiple=True,
    default=SAMPLINGS,
    help="Only this one; by default both.",
)
@click.option("--num-draft-tokens", default=1, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@output_options
def main(
    models: tuple[str, ...],
    mtp: str | None,
    samplings: tuple[str, ...],
    num_draft_tokens: int,
    tokens: int,
    repeats: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure decoding with MTP heads, each time in a process of its own."""
    speculation = {"mtp": mtp or True, "num_draft_tokens": num_draft_tokens}
    measurements = [
        Measurement(model, sampling, options, tokens)
        for model in models or [str(MODEL)]
        for sampling in samplings
        for _ in range(repeats)
        for options in ({}, speculation)
    ]
    machine, runs = run_apart(measurements)
    rows = summarize(measurements, runs)
    report = {"machine": machine, "rows": rows, "runs": runs}
    write_results(render(report), report, markdown, as_json)
    if plot is not None:
        bars = {f"{row['model']}, {row['sampling']}": row["speed_up"] for row in rows}
        plot_bars(plot, bars, "Speed-up with the MTP head")


def run_apart(
    measurements: list[Measurement],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Describe the machine, and make each measurement in a process of its own."""
    from mlx_optiq_ext.cli._machine import describe_machine

    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        machine = pool.submit(describe_machine).result()
        with click.progressbar(measurements, label="Measuring") as progress:
            return machine, [pool.submit(m.run).result() for m in progress]


def summarize(
    measurements: list[Measurement], runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make a row of the table for each model and each kind of sampling."""
    rows = []
    for model, sampling in dict.fromkeys((m.model, m.sampling) for m in measurements):
        found = [
            (m, run)
            for m, run in zip(measurements, runs, strict=True)
            if (m.model, m.sampling) == (model, sampling)
        ]
        base, own = (
            statistics.median(
                run["tps"] for m, run in found if bool(m.options) == is_speculative
            )
            for is_speculative in (False, True)
        )
        rates = [run["acceptance"] for m, run in found if m.options]
        rows.append(
            {
                "model": Path(model).name,
                "sampling": sampling,
                "base_tps": base,
                "mtp_tps": own,
                "speed_up": own / base,
                "acceptance": statistics.median(rates),
            }
        )
    return rows


def render(report: dict[str, Any]) -> str:
    parts = ["# Decoding with an MTP head", markdown_machine(report["machine"])]
    counts = sorted({run["question_tokens"] for run in report["runs"]})
    parts.append(f"The question has {', '.join(map(str, counts))} tokens.")
    for sampling in dict.fromkeys(row["sampling"] for row in report["rows"]):
        rows = [
            (
                row["model"],
                f"{row['base_tps']:.1f}",
                f"{row['mtp_tps']:.1f}",
                f"{row['speed_up']:.2f}x",
                f"{row['acceptance']:.1%}",
            )
            for row in report["rows"]
            if row["sampling"] == sampling
        ]
        parts += [f"## {sampling.capitalize()}", markdown_table(COLUMNS, rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
