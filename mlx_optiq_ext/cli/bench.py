"""`mlx-optiq-ext bench` measures whether speculation pays for a model here."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import click

MAX_DEPTH = 4
NUM_CONTEXT_TOKENS = 200
# Decoding all prompts may take this long; loading the model and measuring the cost of
# rows come on top.
SECONDS = 25.0
# These are the fewest and the most tokens of an answer.
NUM_TOKENS = (16, 128)

Report = dict[str, Any]
Prompts = dict[str, list[int]]
Variants = list[dict[str, Any]]


@click.command()
@click.option("--model", required=True, help="A folder or a Hub id.")
@click.option("--mtp", help="Its MTP head, if it is elsewhere.")
@click.option("--draft", help="A Gemma-4 assistant or another drafter.")
@click.option(
    "--max-depth",
    type=click.IntRange(1, 8),
    default=MAX_DEPTH,
    show_default=True,
    help="The most draft tokens in a round.",
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    help="The most tokens of each answer; by default what half a minute allows.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str,
    mtp: str | None,
    draft: str | None,
    max_depth: int,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Measure what speculation costs and gains with a model on this machine."""
    if mtp and draft:
        raise click.UsageError("--mtp and --draft exclude each other.")
    drafter = {"draft": draft} if draft else {"mtp": mtp or True}
    try:
        report = measure(model, drafter, range(1, max_depth + 1), tokens)
    except (OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(json.dumps(report, indent=2) if as_json else render(report))


def measure(
    path: str, drafter: dict[str, Any], depths: Sequence[int], num_tokens: int | None
) -> Report:
    """Compare plain decoding with each depth on the built-in prompts.

    Args:
        path (str): The folder or Hub id of the model.
        drafter (dict): The argument of ``stream_generate`` that names the drafter.
        depths (Sequence[int]): The numbers of draft tokens in a round.
        num_tokens (int, optional): The most tokens of each answer. Default: what half
          a minute allows.
    """
    from mlx_lm import load

    from .. import patches
    from .._comparing import PROMPTS, chat_prompt
    from ._machine import describe_machine

    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    patches.enable()
    model, tokenizer = load(path)
    prompts = {name: chat_prompt(tokenizer, text) for name, text in PROMPTS.items()}
    variants = [{**drafter, "num_draft_tokens": depth} for depth in depths]
    num_tokens = _prepare(model, tokenizer, prompts, variants, num_tokens)
    comparisons = _compare(model, tokenizer, prompts, variants, num_tokens)
    by_depth = {
        depth: summarize({name: found[i] for name, found in comparisons.items()})
        for i, depth in enumerate(depths)
    }
    best = max(by_depth, key=lambda depth: by_depth[depth]["speed_up"])
    return {
        "model": path,
        "machine": describe_machine(),
        "max_tokens": num_tokens,
        "verify_cost": _verify_cost(model, prompts, len(depths) + 1),
        "depths": by_depth,
        "best_depth": best if by_depth[best]["speed_up"] > 1 else 0,
    }


def _prepare(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    variants: Variants,
    num_tokens: int | None,
) -> int:
    """Warm every variant up, and return how long answers may be."""
    from .._comparing import decode, warm_up

    first = next(iter(prompts.values()))
    warm_up(model, tokenizer, first, variants)
    if num_tokens is not None:
        return num_tokens
    tps = decode(model, tokenizer, first, NUM_TOKENS[0], {}).tps
    return affordable_tokens(tps, len(prompts) * (1 + len(variants)))


def _compare(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    variants: Variants,
    num_tokens: int,
) -> dict[str, list[Any]]:
    """Decode every prompt in every variant, and show how far that is."""
    from .._comparing import compare

    comparisons: dict[str, list[Any]] = {}
    with click.progressbar(prompts.items(), label="Decoding", file=sys.stderr) as items:
        for name, prompt in items:
            # Where the output is no terminal, each label is a line.
            items.label = f"Decoding {name} ({len(comparisons) + 1} of {len(prompts)})"
            items.render_progress()
            comparisons[name] = compare(
                model, tokenizer, prompt, variants, max_tokens=num_tokens
            )
    return comparisons


def affordable_tokens(tps: float, num_answers: int) -> int:
    """Compute how long answers may be for all of them to take about half a minute.

    Args:
        tps (float): The speed of plain decoding, in tokens per second.
        num_answers (int): How many answers there are.
    """
    fewest, most = NUM_TOKENS
    return max(fewest, min(most, int(SECONDS * tps / num_answers)))


def summarize(comparisons: dict[str, Any]) -> Report:
    """Summarise one depth over all prompts, weighted by their numbers of tokens.

    Args:
        comparisons (dict): The comparison of each prompt, by its name.
    """
    plain_seconds = sum(c.num_tokens / c.plain_tps for c in comparisons.values())
    # A text that differs may have another length, so both times are for plain's length.
    own_seconds = sum(c.num_tokens / c.speculative_tps for c in comparisons.values())
    stats = [c.stats for c in comparisons.values()]
    num_drafted = sum(s.num_drafted for s in stats)
    return {
        "plain_tps": sum(c.num_tokens for c in comparisons.values()) / plain_seconds,
        "speed_up": plain_seconds / own_seconds,
        "acceptance_rate": sum(s.num_accepted for s in stats) / max(num_drafted, 1),
        "acceptance_rate_by_prompt": {
            name: c.stats.acceptance_rate for name, c in comparisons.items()
        },
        "differences": {
            name: asdict(c.difference)
            for name, c in comparisons.items()
            if c.difference is not None
        },
    }


def _verify_cost(model: Any, prompts: Prompts, max_rows: int) -> dict[int, float]:
    """Measure the cost of each number of rows, relative to one, after a context."""
    import mlx.core as mx

    from .._costs import filled_cache, measure_verify_seconds

    tokens = mx.array([*chain(*prompts.values())][:NUM_CONTEXT_TOKENS])
    cache = filled_cache(model, tokens)
    seconds = measure_verify_seconds(model, cache, tokens, range(1, max_rows + 1))
    return {rows: value / seconds[1] for rows, value in seconds.items()}


def render(report: Report) -> str:
    """Lay a report out as text for people."""
    lines = [f"{name + ':':<12}{text}" for name, text in report["machine"].items()]
    cost = report["verify_cost"].items()
    lines += [
        "",
        "Cost of verifying rows at once, over that of one row:",
        "  " + "   ".join(f"{rows}: {value:.2f}" for rows, value in cost),
        "",
        f"{'depth':<7}{'speed-up':<10}{'accepted':<10}outputs",
    ]
    for depth, found in report["depths"].items():
        speed_up, accepted = f"{found['speed_up']:.2f}x", found["acceptance_rate"]
        identical = "different" if found["differences"] else "identical"
        lines.append(f"{depth:<7}{speed_up:<10}{f'{accepted:.1%}':<10}{identical}")
    return "\n".join(
        [*lines, "", *_acceptance(report), *_differences(report), _best(report)]
    )


def _acceptance(report: Report) -> list[str]:
    first = next(iter(report["depths"].values()))["acceptance_rate_by_prompt"]
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in first.items())
    return [f"Accepted at depth 1: {rates}"]


def _differences(report: Report) -> list[str]:
    return [
        f"Depth {depth}, {name}: differs from token {difference['position']} on, where "
        f"the two best logits are {difference['margin']:.3g} apart"
        for depth, found in report["depths"].items()
        for name, difference in found["differences"].items()
    ]


def _best(report: Report) -> str:
    if (best := report["best_depth"]) == 0:
        return "Best: plain decoding; speculation does not pay here"
    plain = report["depths"][best]["plain_tps"]
    return (
        f"Best: --num-draft-tokens {best}, "
        f"{plain * report['depths'][best]['speed_up']:.1f} tokens per second "
        f"instead of {plain:.1f}"
    )
