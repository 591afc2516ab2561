"""The command line `mlx-optiq-ext`."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .demo import demo
from .status import status


@click.group()
@click.version_option(__version__, prog_name="mlx-optiq-ext")
def main() -> None:
    """Speculative decoding for mlx-lm."""


main.add_command(bench)
main.add_command(demo)
main.add_command(status)
