"""Commands that run once beside the server: a benchmark, a download."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shlex
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from ._feed import Feed
from ._process import OFFLINE, Child, describe_exit

PROGRESS = re.compile(r"(\d+) of (\d+)")
NUM_LINES = 20

Around = AbstractAsyncContextManager[None]


@dataclass
class JobState:
    """What pages are told of a job.

    Args:
        number (int): Of jobs so far.
        status (str): ``running``, ``done``, ``stopped`` or ``failed``.
        started (float): In seconds since the epoch.
        command (str): Its command line.
        about (dict): What it is for, as the page asked for it.
        progress (float): From 0 to 1.
        lines (list): The last ones of its log.
        problem (str, optional): Why it failed.
        result: What it printed, if that is JSON.
    """

    number: int
    status: str
    started: float
    command: str
    about: dict[str, Any]
    progress: float = 0.0
    lines: list[str] = field(default_factory=list)
    problem: str | None = None
    result: Any = None


class Job:
    """Runs one command at a time.

    Args:
        name (str): Of the event that tells its state.
        feed (Feed): Is told each change.
    """

    def __init__(self, name: str, feed: Feed):
        self.name = name
        self.state: JobState | None = None
        self._feed = feed
        self._numbers = itertools.count(1)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(
        self,
        command: Sequence[str],
        about: dict[str, Any],
        around: Around,
        environment: Mapping[str, str] = OFFLINE,
    ) -> None:
        """Start a command.

        Args:
            command (list): Its name and arguments.
            about (dict): Passed on to pages.
            around (AbstractAsyncContextManager): Entered before it, and left when it
              has ended, however that was.
            environment (dict): Variables besides those of the Lab. By default it must
              not ask the Hub.

        Raises:
            ValueError: If one is running.
        """
        if self.is_running:
            raise ValueError(f"a {self.name} is running")
        self.state = JobState(
            next(self._numbers), "running", time.time(), shlex.join(command), about
        )
        self._task = asyncio.create_task(self._run(command, around, environment))

    async def stop(self) -> None:
        """Give it up, if it is running."""
        if self._task is not None and self.is_running:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(
        self,
        command: Sequence[str],
        around: Around,
        environment: Mapping[str, str],
    ) -> None:
        output: list[str] = []
        recent: deque[str] = deque(maxlen=NUM_LINES)

        def on_line(text: str) -> None:
            recent.append(text)
            if match := PROGRESS.search(text):
                self._set(progress=(int(match[1]) - 1) / max(int(match[2]), 1))
            self._set(lines=list(recent))

        self._set()
        try:
            async with (
                around,
                Child.running(command, on_line, output.append, environment) as child,
            ):
                self._finish(await child.wait(), output)
        except asyncio.CancelledError:
            self._set(status="stopped")
        except OSError as error:
            self._set(status="failed", problem=str(error))

    def _finish(self, code: int, output: list[str]) -> None:
        if code != 0:
            self._set(status="failed", problem=describe_exit(code))
            return
        try:
            result = json.loads("\n".join(output))
        except ValueError:
            result = None
        self._set(status="done", progress=1.0, result=result)

    def _set(self, **changes: Any) -> None:
        assert self.state is not None
        for name, value in changes.items():
            setattr(self.state, name, value)
        self._feed.publish(self.name, asdict(self.state))
