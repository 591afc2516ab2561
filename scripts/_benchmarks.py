"""What the benchmark scripts share: who measured, and how results are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

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
        as_json.write_text(f"{json.dumps(results, indent=2)}\n")


def output_options(command: Any) -> Any:
    """The options of a command that say where its results go."""
    path = click.Path(dir_okay=False, path_type=Path)
    for name, variable in (("--json", "as_json"), ("--markdown", "markdown")):
        command = click.option(name, variable, type=path, help="Also write this file.")(
            command
        )
    return command
