"""What the benchmark scripts share: who measured, and how results are written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Row = Sequence[str]


def markdown_table(columns: Row, rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_machine(machine: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in machine.items())


def write_results(
    text: str, results: Mapping[str, Any], markdown: Path | None, as_json: Path | None
) -> None:
    """Print what was measured and write it to files.

    Args:
        text (str): For people, in Markdown.
        results (Mapping[str, Any]): The same for programs.
        markdown (Path, optional): Where the first goes, beside the terminal.
        as_json (Path, optional): Where the second goes.
    """
    click.echo(text)
    if markdown is not None:
        markdown.write_text(f"{text}\n")
    if as_json is not None:
        as_json.write_text(f"{json.dumps(results, indent=2, default=vars)}\n")


def numbers(kind: type) -> Callable[..., tuple[Any, ...]]:
    """Reads an option that is a list of numbers."""
    return lambda context, parameter, text: tuple(map(kind, text.split(",")))


def clock_option(command: Any) -> Any:
    """The option of a command that says what clock it measures with."""
    return click.option(
        "--clock",
        type=click.Choice(list(CLOCKS)),
        default="wall",
        help="On mlx's CPU backend, `cpu` sees less of what else the machine does.",
    )(command)


def output_options(command: Any) -> Any:
    """The options of a command that say where its results go."""
    path = click.Path(dir_okay=False, path_type=Path)
    options = {
        "as_json": ("--json", "Also write the results to this file, as JSON."),
        "markdown": ("--markdown", "Also write them to this file, as Markdown."),
        "plot": ("--plot", "Draw them into this PNG; needs the extra `plot`."),
    }
    for variable, (name, text) in options.items():
        command = click.option(name, variable, type=path, help=text)(command)
    return command


def plot_bars(path: Path, bars: Mapping[str, float], title: str) -> None:
    """Draw a speed-up for each name."""
    figure, axes = _figure()
    axes.barh(list(bars), list(bars.values()))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_title(title)
    figure.savefig(path)


def plot_line(
    path: Path, points: Mapping[int, float], x_label: str, y_label: str
) -> None:
    """Draw one figure over whole numbers."""
    figure, axes = _figure()
    axes.plot(list(points), list(points.values()), marker="o")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(xlabel=x_label, ylabel=y_label, xticks=list(points))
    figure.savefig(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise click.ClickException(
            'A plot needs matplotlib: pip install "mlx-optiq-ext[plot]"'
        ) from exc
    figure = Figure(layout="constrained")
    return figure, figure.subplots()
