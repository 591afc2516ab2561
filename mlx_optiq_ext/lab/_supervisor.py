"""One server as a child process: started, watched, started again, stopped.

Invariant: the state that pages are told is that of the process. ``ready`` means that
it has answered a request since it was started: mlx-lm listens before it has loaded a
model, and goes on listening if it cannot. ``silent`` means that it has not answered any
for a while, and may again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import httpx2

from ._feed import Feed
from ._launch import Launch
from ._log import Log
from ._process import Child, describe_exit, memory_of

BACK_OFF_SECONDS = (1.0, 2.0, 5.0, 15.0)
# A server that has run for so long is not one that cannot run.
STEADY_SECONDS = 60.0
PROGRESS_SECONDS = 0.5
HEALTH_SECONDS = 1.0
# A server that does not answer for so long, though nothing is generated for the answer.
SILENCE_SECONDS = 10.0
NUM_LAST_LINES = 20
# As mlx-lm says that its port is its own.
LISTENS = "Starting httpd at "
DOES_NOT_ANSWER = "the server runs but does not answer"
CANNOT_GENERATE = "the server runs but cannot generate any more"


class Status(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SILENT = "silent"
    STOPPING = "stopping"
    WAITING = "waiting"
    FAILED = "failed"


# A server that is silent for a while has been there all the time.
RUNNING = {Status.READY, Status.SILENT}


@dataclass(frozen=True)
class State:
    """What pages are told of the server.

    Args:
        status (Status): Of the process.
        since (float): When it became so, in seconds since the epoch.
        settings (dict, optional): It was started with.
        command (str): Its command line.
        url (str): Where it listens.
        pid (int, optional): Of the process.
        problem (str, optional): Why it is not running.
        last_lines (list): Of the log, if there is a problem.
        num_restarts (int): Since it last ran steadily.
        retry_at (float, optional): When it is started again.
        memory_bytes (int, optional): Resident, while it is loading.
        expected_bytes (int, optional): Of the weights.
    """

    status: Status = Status.STOPPED
    since: float = field(default_factory=time.time)
    settings: dict[str, Any] | None = None
    command: str = ""
    url: str = ""
    pid: int | None = None
    problem: str | None = None
    last_lines: list[str] = field(default_factory=list)
    num_restarts: int = 0
    retry_at: float | None = None
    memory_bytes: int | None = None
    expected_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What pages are told, with the time that it is here."""
        return {**asdict(self), "now": time.time()}


class PortInUse(OSError):
    """Something else listens where the server should."""


class Supervisor:
    """Runs one server at a time.

    Args:
        feed (Feed): Is told each change of state, and the log.
        back_off (Sequence): Seconds to wait before each further attempt to restart.
        silence (float): Seconds without an answer after which a server is silent.
    """

    def __init__(
        self,
        feed: Feed,
        back_off: Sequence[float] = BACK_OFF_SECONDS,
        silence: float = SILENCE_SECONDS,
    ):
        self.state = State()
        self.launch: Launch | None = None
        self.log = Log()
        self._feed = feed
        self._back_off = back_off
        self._silence = silence
        self._listens = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._client = httpx2.AsyncClient(timeout=None, trust_env=False)

    async def start(self, launch: Launch) -> None:
        """Stop what runs and start a server; returns while it is loading.

        One that is being loaded for another page already is left alone.

        Raises:
            PortInUse: If something else than the server that runs has its port.
        """
        async with self._turn:
            if self.state.status == Status.STARTING and self.launch == launch:
                return
            is_own = self.launch is not None and self.launch.port == launch.port
            if not (is_own and self._task):
                check_port(launch.port)
            await self._halt()
            check_port(launch.port)
            self.launch = launch
            self.state = State(settings=launch.settings, command=launch.shell_command)
            expected = _expected_bytes(launch)
            self._set(Status.STARTING, url=launch.url, expected_bytes=expected)
            self._task = asyncio.create_task(self._run(launch))

    async def try_to_start(self, launch: Launch) -> None:
        """Start a server that nobody waits for: what is against it is told as state."""
        try:
            await self.start(launch)
        except PortInUse as error:
            self._fail(Status.FAILED, str(error), settings=launch.settings, command="")

    async def stop(self) -> None:
        """Stop the server, if one runs or is to be started again."""
        # Whoever asked may be cancelled; what has begun to stop is stopped anyway.
        await asyncio.shield(self._stop())

    async def _stop(self) -> None:
        async with self._turn:
            await self._halt()

    async def close(self) -> None:
        """Stop for good."""
        await self.stop()
        await self._client.aclose()

    async def _halt(self) -> None:
        if self._task is None:
            return
        if not self._task.done():
            self._set(Status.STOPPING)
            self._task.cancel()
            await asyncio.wait({self._task})
        self._task = None
        self._set(Status.STOPPED, pid=None, retry_at=None, num_restarts=0)

    async def _run(self, launch: Launch) -> None:
        """Keep a server running until it cannot be."""
        try:
            await self._keep_running(launch)
        except Exception as error:
            self._fail(Status.FAILED, f"{type(error).__name__}: {error}")
            raise

    async def _keep_running(self, launch: Launch) -> None:
        num_failures = 0
        was_ready = False
        while True:
            began = time.monotonic()
            problem, is_ready = await self._run_once(launch)
            was_ready = was_ready or is_ready
            if time.monotonic() - began >= STEADY_SECONDS:
                num_failures = 0
            if not was_ready or num_failures >= len(self._back_off):
                self._fail(Status.FAILED, problem, num_restarts=num_failures)
                return
            seconds = self._back_off[num_failures]
            num_failures += 1
            self._fail(
                Status.WAITING,
                problem,
                num_restarts=num_failures,
                retry_at=time.time() + seconds,
            )
            await asyncio.sleep(seconds)

    async def _run_once(self, launch: Launch) -> tuple[str, bool]:
        """Run a server to its end; why it ended, and whether it was ever ready."""
        self._listens.clear()
        async with Child.running(
            launch.command, self._add_line, environment=launch.environment
        ) as child:
            self._set(Status.STARTING, pid=child.pid, retry_at=None)
            if problem := await self._until(child, self._load(launch, child.pid)):
                return problem, False
            self._set(Status.READY, problem=None, last_lines=[], memory_bytes=None)
            return await self._until(child, self._watch(launch)) or "it ended", True

    async def _until(self, child: Child, work: Any) -> str | None:
        """The result of something that is given up when the child ends."""
        working, ending = asyncio.create_task(work), asyncio.create_task(child.wait())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return f"the server ended: {describe_exit(ending.result())}"
            return await working
        finally:
            working.cancel()
            ending.cancel()

    async def _load(self, launch: Launch, pid: int) -> str | None:
        """Wait until the server answers; what it said if it never will."""
        progress = asyncio.create_task(self._show_progress(pid))
        try:
            # Until then another program could answer at its port.
            await self._listens.wait()
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    return await self._try_out(launch)
                await asyncio.sleep(PROGRESS_SECONDS / 5)
        finally:
            progress.cancel()

    async def _try_out(self, launch: Launch) -> str | None:
        body = {"prompt": "Hi", "max_tokens": 1}
        url = f"{launch.url}/v1/completions"
        reply = await self._client.post(url, json=body, headers=launch.headers)
        if reply.is_success:
            return None
        return f"the server cannot answer: {_message(reply)}"

    async def _show_progress(self, pid: int) -> None:
        while True:
            self._set(Status.STARTING, memory_bytes=await memory_of(pid))
            await asyncio.sleep(PROGRESS_SECONDS)

    async def _watch(self, launch: Launch) -> str:
        """Wait until a server that runs says that it cannot answer any more."""
        answered = time.monotonic()
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            is_well = await self._is_well(launch)
            if is_well is False:
                return CANNOT_GENERATE
            if is_well:
                answered = time.monotonic()
                self._set(Status.READY, problem=None)
            elif time.monotonic() - answered >= self._silence:
                self._set(Status.SILENT, problem=DOES_NOT_ANSWER)

    async def _is_well(self, launch: Launch) -> bool | None:
        """Whether a server can generate, None if it does not say."""
        try:
            url = f"{launch.url}/health"
            reply = await self._client.get(url, timeout=self._silence)
        except httpx2.TransportError:
            return None
        return reply.is_success

    def _fail(self, status: Status, problem: str, **changes: Any) -> None:
        lines = self.log.last(NUM_LAST_LINES)
        self._set(status, problem=problem, last_lines=lines, pid=None, **changes)

    def _set(self, status: Status, **changes: Any) -> None:
        """Change the state, and tell pages if it is another."""
        before = self.state
        is_same = status == before.status or {status, before.status} <= RUNNING
        since = before.since if is_same else time.time()
        self.state = replace(before, status=status, since=since, **changes)
        if self.state != before:
            self._feed.publish("state", self.state.as_json())

    def _add_line(self, text: str) -> None:
        if LISTENS in text:
            self._listens.set()
        if (line := self.log.add(text)) is not None:
            self._feed.publish("log", [line])


def check_port(port: int) -> None:
    """See that nothing listens on a port of loopback.

    Raises:
        PortInUse: If something does.
    """
    with socket.socket() as probe:
        # As the server does it, so that ports of connections that are over are free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PortInUse(
                f"port {port} is in use by another program: stop it, or choose another "
                "port"
            ) from error


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _expected_bytes(launch: Launch) -> int:
    return launch.model.num_bytes + (launch.drafter.num_bytes if launch.drafter else 0)


def _message(reply: httpx2.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(reply.json()["error"]["message"])
    return f"HTTP status {reply.status_code}"
