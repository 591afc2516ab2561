"""Sets up the models that benchmarks measure, and writes their results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
from engine.models import make_drafter, make_model
from engine.options import Subject

from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.drafters import Drafter

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Row = Sequence[str]


class SetUp(NamedTuple):
    """What a benchmark decodes with.

    Args:
        model (nn.Module): A model of a real shape with random weights.
        drafter (Drafter): The head or assistant that such a model brings along.
        prompt (mx.array): Random tokens, ``[num_tokens]``.
    """

    model: nn.Module
    drafter: Drafter
    prompt: mx.array


def set_up(subject: Subject, num_prompt_tokens: int) -> SetUp:
    """Make the model that is measured, its drafter and a prompt.

    Args:
        subject (Subject): The model's shape, and how its weights are kept.
        num_prompt_tokens (int): The length of the prompt.
    """
    model = make_model(subject.preset, subject.weights)
    drafter = make_drafter(subject.preset, model, subject.weights)
    shape = (num_prompt_tokens,)
    prompt = mx.random.randint(0, subject.vocab_size, shape, key=mx.random.key(0))
    return SetUp(model, drafter, prompt)


def make_report(
    subject: Subject, results: Sequence[Any], **settings: Any
) -> dict[str, Any]:
    """Put results together with what they were measured on.

    Args:
        subject (Subject): The model that was measured.
        results (Sequence): Objects whose attributes are the figures.
        settings (Any): The settings to name with them.
    """
    return {
        "model": str(subject),
        **settings,
        "machine": describe_machine(),
        "results": list(map(vars, results)),
    }


def markdown_table(columns: Row, rows: Sequence[Row]) -> str:
    """Lay rows of text out as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_machine(machine: Mapping[str, str]) -> str:
    """Lay a description of the machine out as a Markdown list."""
    return "\n".join(f"- {name}: {text}" for name, text in machine.items())


def write_results(
    text: str, results: Mapping[str, Any], markdown: Path | None, as_json: Path | None
) -> None:
    """Print what was measured and write it to files.

    Args:
        text (str): The results for people, in Markdown.
        results (Mapping[str, Any]): The results for programs.
        markdown (Path, optional): The file for the text.
        as_json (Path, optional): The file for the results, as JSON.
    """
    click.echo(text)
    if markdown is not None:
        markdown.write_text(f"{text}\n")
    if as_json is not None:
        as_json.write_text(f"{json.dumps(results, indent=2, default=vars)}\n")


def numbers(kind: type) -> Callable[..., tuple[Any, ...]]:
    """Make the callback of an option that is a list of numbers."""
    return lambda context, parameter, text: tuple(map(kind, text.split(",")))


def clock_option(command: Any) -> Any:
    """Add the option that chooses the clock to a command."""
    return click.option(
        "--clock",
        type=click.Choice(list(CLOCKS)),
        default="wall",
        help="On mlx's CPU backend, `cpu` sees less of what else the machine does.",
    )(command)


def output_options(command: Any) -> Any:
    """Add the options that say where results go to a command."""
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
    """Draw a bar for each name, with a line at 1."""
    figure, axes = _figure()
    axes.barh(list(bars), list(bars.values()))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_title(title)
    figure.savefig(path)


def plot_line(
    path: Path, points: Mapping[int, float], x_label: str, y_label: str
) -> None:
    """Draw figures over whole numbers, with a line at 1."""
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
