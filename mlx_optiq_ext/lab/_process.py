"""A child process: its lines, its memory and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

GRACE_SECONDS = 5.0
# A longer line is passed on in parts.
MAX_LINE_BYTES = 1 << 16

OnLine = Callable[[str], None]


def child_arguments(command: Sequence[str]) -> list[str]:
    """What is really run for a command that is shown."""
    return [sys.executable, "-m", f"{__package__}._child", *command]


class Child:
    """A command that runs, and ends with the Lab at the latest.

    Args:
        process (Process): As ``start`` made it.
        readers (Task): Of its output.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        readers: asyncio.Future[tuple[None, None]],
    ):
        self._process = process
        self._readers = readers

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        on_line: OnLine,
        on_output: OnLine | None = None,
        is_offline: bool = True,
    ) -> Child:
        """Start a command.

        Args:
            command (list): Its name, a key of ``_child.MODULES``, and arguments.
            on_line (Callable): Called with each line of what it logs.
            on_output (Callable, optional): Called with the lines of its standard
              output; by default these are taken for log lines too.
            is_offline (bool): Whether it must not ask the Hub.
        """
        process = await asyncio.create_subprocess_exec(
            *child_arguments(command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(is_offline),
            # What interrupts the Lab is not for its children: they are stopped by it.
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        readers = asyncio.gather(
            _pass_on(process.stdout, on_output or on_line),
            _pass_on(process.stderr, on_line),
        )
        return cls(process, readers)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal, once all output has been read."""
        code = await self._process.wait()
        await asyncio.shield(self._readers)
        return code

    async def stop(self) -> int:
        """Ask it to end, make it end if it does not, and return the exit code."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self.wait(), GRACE_SECONDS)
        return await self._process.wait()


async def memory_of(pid: int) -> int | None:
    """Resident memory of a process in bytes, None if the system does not tell."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("ps", "-o", "rss=", "-p", str(pid)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    output, _ = await process.communicate()
    text = output.strip()
    return int(text) << 10 if text.isdigit() else None


def describe_exit(code: int) -> str:
    """What an exit code means, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _environment(is_offline: bool) -> dict[str, str]:
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "1000",
        "NO_COLOR": "1",
    }
    return environment | {"HF_HUB_OFFLINE": "1"} if is_offline else environment


async def _pass_on(stream: asyncio.StreamReader, on_line: OnLine) -> None:
    while line := await _next_line(stream):
        on_line(line.decode(errors="replace").rstrip("\r\n"))


async def _next_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
