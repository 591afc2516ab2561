"""`mlx-optiq-ext extract-mtp` gives a converted model its head back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._commands import command

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
UNFIT = (
    "{} {}, expected the folder of a converted model. Download one with hf download "
    "ORG/NAME --local-dir FOLDER, or use the head from where it is with {}."
)
NO_MODEL = "is no folder with a config.json"
IN_CACHE = "is in the Hub's cache, which is not changed"


@click.command("extract-mtp")
@click.argument("source")
@click.option(
    "--into",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="The folder of a converted Qwen3.5, Qwen3.6 or Qwen3.8 model.",
)
@click.option(
    "--q-bits", type=click.IntRange(min=1), help="Bits of the head's weights."
)
@click.option(
    "--q-group-size",
    type=click.IntRange(min=1),
    help="Number of weights that share a scale.",
)
@click.option("--q-mode", type=click.Choice(MODES), help="Mode of quantisation.")
def extract_mtp(
    source: str,
    folder: Path,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str | None,
) -> None:
    """Add the MTP head of SOURCE to a model that has lost it.

    SOURCE is a folder, a .safetensors file or a Hub id, such as that of the original
    model, of which only the files with the head are downloaded. The head is quantised
    as the model is unless an option says otherwise. If anything fails, the model stays
    as it was.
    """
    from ..heads import add_sidecar, in_hub_cache

    reason = None if (folder / "config.json").is_file() else NO_MODEL
    if reason or in_hub_cache(folder):
        flag = command("--mtp", source)
        raise click.ClickException(UNFIT.format(folder, reason or IN_CACHE, flag))
    try:
        head = _head_for(source, folder, q_bits, q_group_size, q_mode)
        _evaluate(head)
        file = add_sidecar(folder, head)
    # These are raised for what models and disks get wrong; SpeculationError is a
    # ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    size = file.stat().st_size / 1e6
    click.echo(f"Added the MTP head of {source}: {file}, {size:.1f} MB")
    click.echo(f"To check it: {command('mlx-optiq-ext', 'doctor', folder)}")


def _head_for(
    source: str,
    folder: Path,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
) -> Any:
    from mlx_lm.utils import load_model

    from ..heads import (
        Host,
        dequantize_head,
        load_head,
        quantization_params,
        quantize_head,
    )

    model, _ = load_model(folder, lazy=True)
    host = Host.of(model)
    head = load_head(source, host.args, host.dtype)
    if not any((bits, group_size, mode)):
        return quantize_head(head, host.quantization)
    dequantize_head(head, host.dtype)
    params = quantization_params(head, bits, group_size, mode or "affine")
    return quantize_head(head, params)


def _evaluate(head: Any) -> None:
    """Evaluate the arrays of a head, which are quantised only when they are needed."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = [array for _, array in tree_flatten(head.parameters())]
    with click.progressbar(arrays, label="Quantising", show_eta=False) as progress:
        for array in progress:
            mx.eval(array)
