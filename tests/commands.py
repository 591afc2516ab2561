"""The command lines of mlx-lm, run within the process of the tests."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    """What a command leaves behind."""

    code: int
    output: str
    error: str


class Commands:
    """Runs the ``main`` functions that mlx-lm's commands call, patched as they are.

    A process of its own shows the same and takes seconds to import mlx-lm.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, command: str, *arguments: object) -> Result:
        """Run ``mlx_lm.<command>`` with arguments, up to where it exits."""
        module = importlib.import_module(f"mlx_lm.{command}")
        argv = [f"mlx_lm.{command}", *map(str, arguments)]
        self._capsys.readouterr()
        with self._monkeypatch.context() as context:
            context.setattr(sys, "argv", argv)
            code = _exit_code(module.main)
        return Result(code, *self._capsys.readouterr())


def _exit_code(main: object) -> int:
    """Call a function as Python's start-up code of a script does."""
    try:
        main()
    except SystemExit as exc:
        if isinstance(exc.code, str):
            sys.stderr.write(f"{exc.code}\n")
            return 1
        return exc.code or 0
    return 0
