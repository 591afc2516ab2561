"""`mlx-optiq-ext lab`: a page to start a server, choose its drafter and watch it."""

from __future__ import annotations

from pathlib import Path

import click

MISSING = "The Lab needs {}: pip install 'mlx-optiq-ext[lab]'"


@click.command()
@click.option("--model", help="A folder or a Hub id to serve at once.")
@click.option(
    "--models",
    "folders",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A folder with models, besides the Hub's cache; may be given several times.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="0 takes a free one.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--no-browser", is_flag=True, help="Open no browser.")
def lab(
    model: str | None, folders: tuple[Path, ...], port: int, host: str, no_browser: bool
) -> None:
    """Open a page to start a server, choose its drafter and watch it work."""
    from ..lab import LabOptions, serve

    options = LabOptions(model, folders, host, port, not no_browser)
    try:
        serve(options, lambda url: click.echo(f"The Lab is at {url}"))
    except ModuleNotFoundError as error:
        raise click.ClickException(MISSING.format(error.name)) from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
