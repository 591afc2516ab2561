"""`mlx-optiq-ext doctor` says whether speculation will work with a model, and pay."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import click

Report = dict[str, Any]


@click.command()
@click.argument("model")
@click.option(
    "--mtp",
    metavar="PATH",
    help="Where the MTP head is, if it is not beside the model.",
)
@click.option(
    "--draft",
    metavar="PATH",
    help="A Gemma-4 assistant or another drafter to examine the model with.",
)
@click.option(
    "--num-draft-tokens", type=click.IntRange(1, 8), default=1, show_default=True
)
@click.option("--no-test", is_flag=True, help="Read the files only, decode nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    model: str,
    mtp: str | None,
    draft: str | None,
    num_draft_tokens: int,
    no_test: bool,
    as_json: bool,
) -> None:
    """Say whether speculation will work with MODEL, and whether it pays here.

    MODEL is a folder or a Hub id. The exit code is 0 only if it will work.
    """
    if mtp is not None and draft is not None:
        raise click.UsageError("--mtp and --draft exclude each other.")
    from ._diagnosis import diagnose

    track = None if no_test else _track
    report = diagnose(model, mtp, draft, num_draft_tokens, track)
    click.echo(json.dumps(report, indent=2) if as_json else render(report))
    if not report["works"]:
        sys.exit(1)


def _track(prompts: list[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    with click.progressbar(
        prompts, label="Testing", show_eta=False, file=sys.stderr
    ) as progress:
        yield from progress


def render(report: Report) -> str:
    """Lay a report out as lines of a label and a text."""
    lines: list[tuple[str, str]] = []
    for name, render_part in (
        ("model", _render_model),
        ("drafter", _render_drafter),
        ("memory", _render_memory),
        ("test", _render_test),
    ):
        if report[name] is not None:
            lines += render_part(report[name])
    for label, name in (("problem", "problem"), ("to do", "to_do")):
        if report[name] is not None:
            lines.append((label, report[name]))
    lines.append(("verdict", report["verdict"]))
    return "\n".join(f"{label:<15} {text}" for label, text in lines)


def _render_model(model: Report) -> list[tuple[str, str]]:
    return [
        ("model", model["path"]),
        ("", f"{model['type']}, {model['num_layers']} layers, {_weights(model)}"),
    ]


def _render_drafter(drafter: Report) -> list[tuple[str, str]]:
    lines = [("drafter", f"{drafter['kind']}, it fits the model")]
    if "files" not in drafter:
        lines.append(("", drafter["source"]))
    else:
        lines += [("", file) for file in drafter["files"]]
        lines.append(("layout", drafter["layout"]))
        lines.append(("norms", f"{drafter['norms']}: {drafter['norms_told_by']}"))
    return [*lines, ("", _weights(drafter))] if "num_bytes" in drafter else lines


def _weights(part: Report) -> str:
    kinds = [f"{kind} ({num} layers)" for kind, num in part["quantization"].items()]
    size = f"{_number(part['num_parameters'])} parameters, {part['dtype']}"
    return f"{size}, {', '.join(kinds) or 'not quantised'}"


def _render_memory(memory: Report) -> list[tuple[str, str]]:
    text = f"model {_bytes(memory['model_bytes'])}"
    text += f", drafter {_bytes(memory['drafter_bytes'])}"
    if per_token := memory["drafter_bytes_per_token"]:
        text += f" and {_bytes(per_token * 1000)} per 1000 tokens"
    if device := memory["device_bytes"]:
        text += f", of {_bytes(device)} here"
    return [("memory", text)]


def _render_test(test: Report) -> list[tuple[str, str]]:
    prompts = test["prompts"]
    speeds = ", ".join(
        f"{name} {x['speculative_tps'] / x['plain_tps']:.2f}x"
        for name, x in prompts.items()
    )
    return [
        *_render_exactness(prompts),
        (
            "acceptance",
            f"{test['acceptance_rate']:.1%} of draft tokens, "
            f"{test['mean_accepted_length']:.2f} tokens a round, at depth "
            f"{test['num_draft_tokens']}",
        ),
        ("speed-up", f"{test['speed_up']:.2f}x: {speeds}"),
        ("", "from one run of each; mlx-optiq-ext bench measures more"),
    ]


def _render_exactness(prompts: dict[str, Report]) -> list[tuple[str, str]]:
    differences = {name: x["difference"] for name, x in prompts.items()}
    num_identical = list(differences.values()).count(None)
    return [
        ("exactness", f"{num_identical} of {len(prompts)} texts are identical"),
        *(
            (
                "",
                f"{name}: token {x['position']} differs, which plain decoding "
                f"preferred by {x['margin']:.3f}",
            )
            for name, x in differences.items()
            if x is not None
        ),
    ]


def _number(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _bytes(size: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
