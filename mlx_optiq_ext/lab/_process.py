"""A child process: its lines, its memory and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05
# For the last lines of a process that has ended.
DRAIN_SECONDS = 1.0
# A longer line is passed on in parts.
MAX_LINE_BYTES = 1 << 16

OnLine = Callable[[str], None]
OFFLINE = {"HF_HUB_OFFLINE": "1"}


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
    @asynccontextmanager
    async def running(
        cls,
        command: Sequence[str],
        on_line: OnLine,
        on_output: OnLine | None = None,
        environment: Mapping[str, str] = OFFLINE,
    ) -> AsyncIterator[Child]:
        """Start a command, and see that it has ended when the block is left.

        Args:
            command (list): Its name, a key of ``_child.MODULES``, and arguments.
            on_line (Callable): Called with each line of what it logs.
            on_output (Callable, optional): Called with the lines of its standard
              output; by default these are taken for log lines too.
            environment (dict): Variables besides those of the Lab; an empty one is
              taken away. By default it must not ask the Hub.
        """
        process = await asyncio.create_subprocess_exec(
            *child_arguments(command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(environment),
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
        child = cls(process, readers)
        try:
            yield child
        finally:
            await child.stop()
            readers.cancel()
            await asyncio.wait({readers})

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal, once its output has been read."""
        # Process.wait would wait for the pipes, which what it started may hold open.
        while (code := self._process.returncode) is None:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.wait({self._readers}, timeout=DRAIN_SECONDS)
        return code

    async def stop(self) -> int:
        """Ask it to end, make it end if it does not, and return the exit code.

        What it started itself ends with it: all of that is in its session.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self.wait(), GRACE_SECONDS)
        return await self.wait()


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


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    plain = {"PYTHONUNBUFFERED": "1", "COLUMNS": "1000", "NO_COLOR": "1"}
    variables = {**os.environ, **plain, **changes}
    return {name: value for name, value in variables.items() if value}


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
