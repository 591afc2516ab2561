"""Measure whether speculation gains as much with a grammar as without one.

Four ways to decode alternate: plain and speculative, each with and without a JSON
schema. A row says what speculation gains in either case, the share of the first in the
second, and how much of the time the host works on masks. That is the time that it would
take if nothing were computed meanwhile; on a GPU most of it is hidden.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 \\
        python scripts/bench_structured.py --clock cpu
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import mlx_lm
from _benchmarks import (
    CLOCKS,
    clock_option,
    markdown_machine,
    markdown_table,
    output_options,
    plot_bars,
    write_results,
)

from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.cli.demo import MODEL
from mlx_optiq_ext.grammars import ReplyConstraint

PROMPT = "def read_config(path):\n    "
STRING = {"type": "string", "maxLength": 24}
PERSON = {
    "type": "object",
    "properties": {
        "name": STRING,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": STRING,
        "roles": {"type": "array", "items": {"enum": ["admin", "user"]}, "maxItems": 2},
    },
    "required": ["name", "age", "email", "roles"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "objects": {"type": "array", "items": PERSON, "minItems": 100},
    "strings": {
        "type": "array",
        "items": {"type": "string", "minLength": 30, "maxLength": 200},
        "minItems": 100,
    },
    "any JSON": {"type": "array", "minItems": 1000},
}
COLUMNS = (
    "Schema",
    "Draft tokens",
    "Speed-up without",
    "Speed-up with it",
    "Share",
    "Masks",
)


class Stopwatch:
    """Adds up what the host spends on what may come next.

    Args:
        clock (Callable): Tells the seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self.seconds = 0.0
        self.clock = clock
        self._depth = 0

    def watch(self, name: str) -> None:
        """Time a method of constraints; calls within others count once."""
        method = getattr(ReplyConstraint, name)

        @wraps(method)
        def timed(*args: Any) -> Any:
            self._depth += 1
            start = self.clock()
            try:
                return method(*args)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += self.clock() - start

        setattr(ReplyConstraint, name, timed)


def decode(
    demo: Any, num_tokens: int, clock: Callable[[], float], options: dict[str, Any]
) -> tuple[float, int]:
    """Seconds, and the tokens that came in them, after the first."""
    start = number = 0.0
    responses = mlx_lm.stream_generate(*demo, PROMPT, max_tokens=num_tokens, **options)
    for response in responses:
        start = start or clock()
        number = response.generation_tokens - 1
    return clock() - start, int(number)


def measure(
    demo: Any,
    schema: Any,
    num_draft_tokens: Any,
    num_tokens: int,
    repeats: int,
    stopwatch: Stopwatch,
) -> dict[str, float]:
    """Decode in the four ways, in turns."""
    drafting = {"mtp": True, "num_draft_tokens": num_draft_tokens}
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "drafted": drafting,
        "masked": {"json_schema": schema},
        "both": {"json_schema": schema, **drafting},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    shares = []
    for turn in range(repeats + 1):
        for name, options in ways.items():
            stopwatch.seconds = 0.0
            seconds, number = decode(demo, num_tokens, stopwatch.clock, options)
            # Nothing is compiled, and no depth is tried, after the first turn.
            if turn and number:
                times[name].append(seconds / number)
                if name == "both":
                    shares.append(stopwatch.seconds / seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    without, with_it = (
        median["plain"] / median["drafted"],
        median["masked"] / median["both"],
    )
    return {
        "speed_up_without": without,
        "speed_up_with": with_it,
        "share": with_it / without,
        "masks": statistics.median(shares),
    }


def _number(context: Any, parameter: Any, text: str) -> list[Any]:
    return [part if part == "auto" else int(part) for part in text.split(",")]


@click.command()
@click.option("--model", default=str(MODEL), help="A folder or a Hub id.")
@click.option("--num-draft-tokens", default="auto,1,2,3", callback=_number)
@click.option("--tokens", default=200, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@clock_option
@output_options
def main(
    model: str,
    num_draft_tokens: list[Any],
    tokens: int,
    repeats: int,
    clock: str,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure structured output with and without the model's head."""
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    demo = mlx_lm.load(model)
    stopwatch = Stopwatch(CLOCKS[clock])
    for name in ("mask", "forced", "advance", "roll_back"):
        stopwatch.watch(name)
    rows = []
    for name, schema in SCHEMAS.items():
        for number in num_draft_tokens:
            found = measure(demo, schema, number, tokens, repeats, stopwatch)
            rows.append({"schema": name, "num_draft_tokens": number, **found})
    machine = describe_machine()
    report = {"machine": machine, "rows": rows}
    write_results(render(report), report, markdown, as_json)
    if plot is not None:
        bars = {f"{r['schema']}, {r['num_draft_tokens']}": r["share"] for r in rows}
        plot_bars(plot, bars, "Speed-up with a grammar, of that without")


def render(report: dict[str, Any]) -> str:
    rows = [
        (
            row["schema"],
            str(row["num_draft_tokens"]),
            f"{row['speed_up_without']:.2f}x",
            f"{row['speed_up_with']:.2f}x",
            f"{row['share']:.2f}",
            f"{row['masks']:.1%}",
        )
        for row in report["rows"]
    ]
    return "\n\n".join(
        [
            "# Structured output with an MTP head",
            markdown_machine(report["machine"]),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
