"""`mlx-optiq-ext demo` runs an embedded model, plain and with its drafter."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from .._options import MAX_DRAFT_TOKENS

PACKAGE = Path(__file__).parents[1]
MODEL = PACKAGE / "demo_model"
GEMMA = PACKAGE / "demo_gemma"
FAMILIES: dict[str, tuple[Path, dict[str, Any]]] = {
    "qwen": (MODEL, {"mtp": True}),
    "gemma": (GEMMA, {"draft": GEMMA / "assistant"}),
}
PROMPT = "Write a function that removes duplicates from a list."
NUM_WARM_UP_TOKENS = 8
DRAFT_COLOR = "green"
DOES_NOT_PAY = (
    "Here a pass over several tokens costs about as much as several passes, as it does "
    "on mlx's CPU backend. --num-draft-tokens auto finds that out and drafts less."
)


@click.command()
@click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    default="qwen",
    show_default=True,
    help="Qwen3.5 with its MTP head, or Gemma-4 with an assistant.",
)
@click.option("--path", is_flag=True, help="Print the folder of the model and exit.")
@click.option("--prompt", default=PROMPT, show_default=True, help="What to ask for.")
@click.option(
    "--tokens",
    "--max-tokens",
    "max_tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="The most tokens to write.",
)
@click.option(
    "--num-draft-tokens",
    type=click.Choice(["auto", *map(str, range(1, MAX_DRAFT_TOKENS + 1))]),
    default="2",
    show_default=True,
)
def demo(
    family: str, path: bool, prompt: str, max_tokens: int, num_draft_tokens: str
) -> None:
    """Ask an embedded model for a function, plain and with its drafter.

    Tokens that came from accepted drafts have another colour where the terminal has
    colours.
    """
    folder, drafter = FAMILIES[family]
    if path:
        click.echo(folder)
        return
    from mlx_lm import load

    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    model, tokenizer = load(str(folder))
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    is_auto = num_draft_tokens == "auto"
    depth = num_draft_tokens if is_auto else int(num_draft_tokens)
    speculation = {**drafter, "num_draft_tokens": depth}
    for options in ({}, speculation):
        _run(model, tokenizer, tokens, NUM_WARM_UP_TOKENS, options)
    _echo(f"{prompt}\n\n", dim=True)
    _echo("Plain\n", bold=True)
    plain = _run(model, tokenizer, tokens, max_tokens, {}, echo=True)
    _echo("Speculative", bold=True)
    _echo(", accepted drafts\n" if _has_colors() else "\n", fg=DRAFT_COLOR)
    speculative = _run(model, tokenizer, tokens, max_tokens, speculation, echo=True)
    _report(plain, speculative)


def _run(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    max_tokens: int,
    options: dict[str, Any],
    echo: bool = False,
) -> list[Any]:
    from mlx_lm import stream_generate

    responses = []
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, **options
    ):
        responses.append(response)
        if echo:
            _echo(response.text, fg=DRAFT_COLOR if response.from_draft else None)
    if echo:
        _echo("\n\n")
    return responses


def _echo(text: str, **style: Any) -> None:
    """Print a part of a line, styled where the terminal has colours."""
    is_styled = any(style.values()) and _has_colors()
    click.echo(click.style(text, **style) if is_styled else text, nl=False)


def _has_colors() -> bool:
    is_plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return not is_plain and sys.stdout.isatty()


def _report(plain: list[Any], speculative: list[Any]) -> None:
    stats = speculative[-1].speculation
    rates = [responses[-1].generation_tps for responses in (plain, speculative)]
    is_same = [r.token for r in plain] == [r.token for r in speculative]
    for name, value in (
        ("Plain", f"{rates[0]:.1f} tokens-per-sec"),
        ("Speculative", f"{rates[1]:.1f} tokens-per-sec"),
        ("Speed-up", f"{rates[1] / rates[0]:.2f}"),
        ("Draft tokens accepted", f"{stats.acceptance_rate:.1%}"),
        ("Mean accepted length", f"{stats.mean_accepted_length:.2f} tokens a round"),
        ("Outputs identical", "yes" if is_same else "no"),
    ):
        click.echo(f"{name + ':':<24}{value}")
    if rates[1] < rates[0]:
        click.echo(f"\n{DOES_NOT_PAY}")
