"""Measure a model with its drafter as the published Gemma table of mlx-optiq does.

Five prompts in the model's chat template, greedy, 200 tokens each; speeds are medians
of three after a warm-up, the last row is their geometric mean. Plain decoding and every
number of draft tokens (gamma) alternate in one process; gamma 0 is plain decoding.

    python scripts/bench_assistant.py                 # the embedded Gemma-4 demo
    python scripts/bench_assistant.py --model MODEL --draft ASSISTANT --plot sweep.png
    python scripts/bench_assistant.py --model MODEL --mtp   # the same with an MTP head
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import click
from _benchmarks import (
    markdown_machine,
    markdown_table,
    output_options,
    plot_line,
    write_results,
)
from mlx_lm import load

from mlx_optiq_ext._comparing import PROMPTS, Comparison, chat_prompt, compare, warm_up
from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.cli.demo import GEMMA

ORDER = ("math", "code", "prose", "dialogue", "reasoning")

# By prompt, then by number of draft tokens.
Results = dict[str, dict[int, Comparison]]


@click.command()
@click.option("--model", help="A folder or a Hub id.")
@click.option("--draft", help="Its assistant.")
@click.option("--mtp", is_flag=True, help="Use the MTP head of the model.")
@click.option("--max-gamma", default=5, show_default=True)
@click.option("--tokens", default=200, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@output_options
def main(
    model: str | None,
    draft: str | None,
    mtp: bool,
    max_gamma: int,
    tokens: int,
    repeats: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure decoding with an assistant over a range of draft tokens."""
    if model is None:
        model, draft = str(GEMMA), str(GEMMA / "assistant")
    if mtp == bool(draft):
        raise click.UsageError("Give --draft or --mtp, and not both.")
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    drafter = {"mtp": True} if mtp else {"draft": draft}
    results = measure(model, drafter, range(1, max_gamma + 1), tokens, repeats)
    rows = {0: {"speed_up": 1.0}} | sweep(results)
    report = {
        "model": Path(model).name,
        "machine": describe_machine(),
        "prompts": {name: by_gamma[1] for name, by_gamma in results.items()},
        "sweep": rows,
    }
    write_results(render(report), report, markdown, as_json)
    if plot is not None:
        points = {gamma: row["speed_up"] for gamma, row in rows.items()}
        plot_line(plot, points, "draft tokens", "speed-up")


def measure(
    path: str, drafter: dict[str, Any], gammas: range, num_tokens: int, repeats: int
) -> Results:
    model, tokenizer = load(path)
    variants = [{**drafter, "num_draft_tokens": gamma} for gamma in gammas]
    results: Results = {}
    with click.progressbar(ORDER, label="Decoding") as progress:
        for name in progress:
            prompt = chat_prompt(tokenizer, PROMPTS[name])
            warm_up(model, tokenizer, prompt, variants)
            found = compare(
                model,
                tokenizer,
                prompt,
                variants,
                max_tokens=num_tokens,
                num_repeats=repeats,
            )
            results[name] = dict(zip(gammas, found, strict=True))
    return results


def sweep(results: Results) -> dict[int, dict[str, Any]]:
    """Measure each number of draft tokens over all prompts."""
    rows = {}
    for gamma in next(iter(results.values())):
        found = [by_gamma[gamma] for by_gamma in results.values()]
        num_drafted = sum(c.stats.num_drafted for c in found)
        rows[gamma] = {
            "speed_up": statistics.geometric_mean(c.speed_up for c in found),
            "plain_tps": statistics.geometric_mean(c.plain_tps for c in found),
            "tps": statistics.geometric_mean(c.speculative_tps for c in found),
            "acceptance": sum(c.stats.num_accepted for c in found) / num_drafted,
            "num_identical": sum(c.is_identical for c in found),
        }
    return rows


def render(report: dict[str, Any]) -> str:
    one = report["sweep"][1]
    prompts = [
        (name, *_cells(c.plain_tps, c.speculative_tps, c.speed_up), _rate(c))
        for name, c in report["prompts"].items()
    ]
    mean = _cells(one["plain_tps"], one["tps"], one["speed_up"])
    prompts.append(("geometric mean", *mean, f"{one['acceptance']:.1%}"))
    num_prompts = len(report["prompts"])
    gammas = [
        (
            str(gamma),
            f"{row['speed_up']:.2f}x",
            f"{row['acceptance']:.1%}" if gamma else "",
            f"{row['num_identical']} of {num_prompts}" if gamma else "",
        )
        for gamma, row in report["sweep"].items()
    ]
    columns = ("Prompt", "Base tok/s", "Speculative tok/s", "Speedup", "Acceptance")
    return "\n\n".join(
        [
            f"# {report['model']}, plain and with its drafter",
            markdown_machine(report["machine"]),
            "## One draft token",
            markdown_table(columns, prompts),
            "## Draft tokens in a round (gamma)",
            markdown_table(("gamma", "Speedup", "Acceptance", "Identical"), gammas),
        ]
    )


def _cells(plain_tps: float, tps: float, speed_up: float) -> tuple[str, ...]:
    return f"{plain_tps:.1f}", f"{tps:.1f}", f"{speed_up:.2f}x"


def _rate(comparison: Comparison) -> str:
    return f"{comparison.stats.acceptance_rate:.1%}"


if __name__ == "__main__":
    main()
