"""`mlx-optiq-ext demo`: an embedded model, plain and with its drafter."""

from __future__ import annotations

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
PROMPT = (
    "def parse_args(argv):\n"
    '    """Parse the command line."""\n'
    "    parser = argparse.ArgumentParser()\n"
)
NUM_WARM_UP_TOKENS = 16


@click.command()
@click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    default="qwen",
    show_default=True,
    help="Qwen3.5 with its MTP head, or Gemma-4 with an assistant.",
)
@click.option("--path", is_flag=True, help="Print the folder of the model and exit.")
@click.option("--prompt", default=PROMPT, help="Text to continue.")
@click.option("--max-tokens", default=200, show_default=True)
@click.option(
    "--num-draft-tokens",
    type=click.Choice(["auto", *map(str, range(1, MAX_DRAFT_TOKENS + 1))]),
    default="auto",
    show_default=True,
)
def demo(
    family: str, path: bool, prompt: str, max_tokens: int, num_draft_tokens: str
) -> None:
    """Decode with an embedded model, plain and with its drafter."""
    folder, drafter = FAMILIES[family]
    if path:
        click.echo(folder)
        return
    from mlx_lm import load

    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    model, tokenizer = load(str(folder))
    is_auto = num_draft_tokens == "auto"
    depth = num_draft_tokens if is_auto else int(num_draft_tokens)
    speculation = {**drafter, "num_draft_tokens": depth}
    for options in ({}, speculation):
        _run(model, tokenizer, prompt, NUM_WARM_UP_TOKENS, options)
    click.secho("Plain", bold=True)
    plain = _run(model, tokenizer, prompt, max_tokens, {}, echo=True)
    click.secho("Speculative", bold=True)
    speculative = _run(model, tokenizer, prompt, max_tokens, speculation, echo=True)
    _report(plain, speculative)


def _run(
    model: Any,
    tokenizer: Any,
    prompt: str,
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
            click.echo(response.text, nl=False)
    if echo:
        click.echo("\n")
    return responses


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
