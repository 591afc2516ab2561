"""The command line `mlx-optiq-ext`."""

from __future__ import annotations

import signal
from typing import Any

import click

from .. import __version__
from .._interrupts import stop
from .bench import bench
from .demo import demo
from .doctor import doctor
from .extract_mtp import extract_mtp
from .lab import lab
from .status import status


class Program(click.Group):
    """A group of commands that Ctrl-C ends with one line."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Commands import mlx-lm, which takes seconds and shows tracebacks.
        signal.signal(signal.SIGINT, stop)
        return self.main(*args, **kwargs)


@click.group(cls=Program)
@click.version_option(__version__, prog_name="mlx-optiq-ext")
def main() -> None:
    """Speculative decoding for mlx-lm."""


main.add_command(bench)
main.add_command(demo)
main.add_command(doctor)
main.add_command(extract_mtp)
main.add_command(lab)
main.add_command(status)
