"""Ends a program that Ctrl-C interrupts with one line and the status of shells."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ._bootstrap import module_run_as_main

LINE = "Stopped."
STATUS = 128 + signal.SIGINT  # as a shell reports it

_SERVER = ("mlx_lm.server", "mlx_lm server")


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGINT: say that the program stops, and let it clean up and exit.

    Args:
        number (int): The number of the signal.
        frame (FrameType, optional): The frame that is interrupted.

    Raises:
        SystemExit: Always, with the status 130.
    """
    # A second Ctrl-C does not wait for what is cleaned up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stderr.write(f"{LINE}\n")
    raise SystemExit(STATUS)


def stop_server_while_imported() -> None:
    """Handle SIGINT until `release` if this process is starting mlx-lm's server.

    Importing mlx-lm takes seconds, and `main` can catch no interrupt before it runs.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    # Whoever started the process may have told it to ignore the signal.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if program() in _SERVER and is_main_thread and is_default:
        signal.signal(signal.SIGINT, stop)


def release() -> None:
    """Let SIGINT raise KeyboardInterrupt again if `stop` handles it."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def program() -> str:
    """Name the command of mlx-lm that this process runs, however it was started.

    Returns:
        str: ``"mlx_lm.COMMAND"`` or ``"mlx_lm COMMAND"``; some other text if this
        process runs another program.
    """
    arguments = sys.argv or [""]
    name = module_run_as_main() or Path(arguments[0]).name.removesuffix(".exe")
    return " ".join([name, *arguments[1:2]]) if name == "mlx_lm" else name
