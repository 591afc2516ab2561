"""The command line `mlx-optiq-ext`."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .demo import demo
from .doctor import doctor
from .extract_mtp import extract_mtp
from .lab import lab
from .status import status


@click.group()
@click.version_option(__version__, prog_name="mlx-optiq-ext")
def main() -> None:
    """Speculative decoding for mlx-lm."""


main.add_command(bench)
main.add_command(demo)
main.add_command(doctor)
main.add_command(extract_mtp)
main.add_command(lab)
main.add_command(status)
