"""`mlx-optiq-ext status` shows what is installed, patched and to be expected here."""

from __future__ import annotations

import importlib
import json
import platform
import warnings
from dataclasses import asdict
from importlib import metadata
from typing import Any

import click

from .. import __version__, patches
from .._errors import SpeculationError
from ._start_up import inspect_start_up

Report = dict[str, Any]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:
    """Show versions, whether mlx-lm is patched, and the backend."""
    report = {
        "versions": _versions(),
        "start_up": asdict(inspect_start_up()),
        "patches": _patches(),
        "backend": _backend(),
    }
    click.echo(json.dumps(report, indent=2) if as_json else render(report))


def _versions() -> Report:
    installed = {name: _version(name) for name in ("mlx", "mlx-lm", "wrapt")}
    return {
        "mlx-optiq-ext": __version__,
        **installed,
        "Python": platform.python_version(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _patches() -> Report:
    problem = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patches.enable()
            for name in patches.target_modules():
                importlib.import_module(name)
    except (SpeculationError, ImportError) as exc:
        problem = str(exc)
    return {
        "supported": list(patches.SUPPORTED),
        "applied": [row.seam for row in patches.applied()],
        "problem": problem or patches.problem(),
    }


def _backend() -> Report:
    try:
        from . import _backend as backend
        from ._exactness import MAX_ROWS, measure_exact_rows
    except ImportError as exc:
        return {"name": None, "problem": str(exc)}
    exact_rows = measure_exact_rows()
    return {
        "name": backend.backend_name(),
        "device": backend.device_name(),
        "row_exact": min(exact_rows.values()) == MAX_ROWS,
        "exact_rows": exact_rows,
        "max_rows": MAX_ROWS,
    }


def render(report: Report) -> str:
    """Lay a report out as lines of a label and a text."""
    lines = [(name, found or "missing") for name, found in report["versions"].items()]
    lines += _render_start_up(report["start_up"])
    lines += _render_patches(report["patches"])
    lines += _render_backend(report["backend"])
    return "\n".join(f"{label:<15} {text}" for label, text in lines)


def _render_start_up(start_up: Report) -> list[tuple[str, str]]:
    if start_up["active"]:
        return [("start-up hook", "active")]
    return [
        ("start-up hook", f"not active: {start_up['reason']}"),
        ("", f"to do: {start_up['cure']}"),
    ]


def _render_patches(found: Report) -> list[tuple[str, str]]:
    lines = [("patched", seam) for seam in found["applied"] or ["nothing"]]
    if found["problem"] is not None:
        lines.append(("problem", found["problem"]))
    return lines


def _render_backend(backend: Report) -> list[tuple[str, str]]:
    if backend["name"] is None:
        return [("backend", f"none: {backend['problem']}")]
    return [
        ("backend", f"{backend['name']} ({backend['device']})"),
        *_render_exactness(backend),
    ]


def _render_exactness(backend: Report) -> list[tuple[str, str]]:
    exact_rows, most = backend["exact_rows"], backend["max_rows"]
    if backend["row_exact"]:
        return [
            ("row-exact", f"yes: a row has the same bits alone and among up to {most}"),
            ("measured", "; ".join(exact_rows)),
        ]
    return [
        ("row-exact", "no: a row's bits depend on how many rows are computed at once,"),
        ("", "so where two tokens are almost equally likely, speculation may"),
        ("", "choose the other one than plain mlx-lm does"),
        *_labelled(
            "not exact",
            [f"{x}: from {n + 1} rows on" for x, n in exact_rows.items() if n < most],
        ),
        *_labelled(
            "exact",
            [f"{x}: up to {n} rows" for x, n in exact_rows.items() if n == most],
        ),
    ]


def _labelled(label: str, texts: list[str]) -> list[tuple[str, str]]:
    """Make a line of each text, and put the label before the first."""
    return [(label if i == 0 else "", text) for i, text in enumerate(texts)]
