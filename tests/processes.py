"""Processes that have imported mlx-lm when they start.

A fresh interpreter spends a second and a half of CPU time on importing mlx-lm. Here one
process imports it, and the others are forked from that one. They are real processes
with arguments, an environment, outputs, signals and an exit code of their own. What an
interpreter does until mlx-lm is imported is tested with fresh ones.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# Importing these computes nothing and starts no thread of mlx, which a fork would lose.
IMPORTED = [
    "mlx_optiq_ext",
    *(f"mlx_lm.{name}" for name in ("server", "chat", "convert", "generate")),
    *(f"mlx_lm.{name}" for name in ("benchmark", "cache_prompt", "models.qwen3_5")),
    "mlx_optiq_ext.serving",
    "mlx_optiq_ext.patches._classes",
]
TIMEOUT = 120.0  # A test that waits longer than this has found a bug.

_context = multiprocessing.get_context("forkserver")


class ForkedProcess:
    """A process that runs Python code, with the methods of ``subprocess.Popen``.

    Args:
        code (str): The code.
        arguments (str): Its ``sys.argv``.
        output (Path): A file for what it prints.
        error (Path, optional): A file for its standard error. Default: ``output``.
        text (str): Its standard input.
        variables (Mapping[str, str]): Further variables of its environment.
    """

    def __init__(
        self,
        code: str,
        *arguments: str,
        output: Path,
        error: Path | None = None,
        text: str = "",
        variables: Mapping[str, str] | None = None,
    ):
        _ensure_imported()
        environment = {**os.environ, **(variables or {})}
        files = (output, error or output)
        self._process = _context.Process(
            target=_run, args=(code, arguments, files, text, environment), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end of the process, and return its exit code."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"process {self.pid} does not end"
        return code

    def kill(self) -> None:
        self._process.kill()


class Result(NamedTuple):
    """What is left of a process that has ended."""

    code: int
    output: str
    error: str


def run(
    code: str,
    *arguments: object,
    text: str = "",
    variables: Mapping[str, str] | None = None,
) -> Result:
    """Run Python code in a forked process to its end.

    Args:
        code (str): The code.
        arguments (object): Its ``sys.argv``.
        text (str): Its standard input.
        variables (Mapping[str, str]): Further variables of its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, error = Path(folder) / "output", Path(folder) / "error"
        process = ForkedProcess(
            code,
            *map(str, arguments),
            output=output,
            error=error,
            text=text,
            variables=variables,
        )
        try:
            exit_code = process.wait()
        finally:
            process.kill()
        return Result(exit_code, output.read_text(), error.read_text())


def run_command(command: str, *arguments: object, text: str = "") -> Result:
    """Run ``mlx_lm.<command>`` as its console script does.

    Args:
        command (str): The name of the command.
        arguments (object): Its arguments.
        text (str): Its standard input.
    """
    code = f"import sys; from mlx_lm.{command} import main; sys.exit(main())"
    return run(code, f"mlx_lm.{command}", *arguments, text=text)


def _ensure_imported() -> None:
    """Start the process that the others are forked from, if there is none."""
    forkserver.set_forkserver_preload(IMPORTED)
    no_cache = Path(tempfile.gettempdir(), f"no-hub-cache-{os.getpid()}")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(no_cache)}
    with mock.patch.dict(os.environ, offline):
        os.environ.pop("MLX_OPTIQ_EXT", None)
        forkserver.ensure_running()


def _run(
    code: str,
    arguments: tuple[str, ...],
    files: tuple[Path, Path],
    text: str,
    environment: dict[str, str],
) -> None:
    """Become what a fresh interpreter would be that has imported mlx-lm."""
    import mlx.core as mx

    for descriptor, file in enumerate(files, start=1):
        # Both outputs may go to one file, where neither overwrites the other.
        with file.open("ab") as target:
            os.dup2(target.fileno(), descriptor)
    with tempfile.TemporaryFile() as source:
        source.write(text.encode())
        source.seek(0)
        os.dup2(source.fileno(), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir("/")
    mx.random.seed(secrets.randbits(32))
    sys.argv = list(arguments)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
