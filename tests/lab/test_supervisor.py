"""The state that is told is that of the process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mlx_optiq_ext.lab._feed import Feed
from mlx_optiq_ext.lab._launch import Launch, read_launch
from mlx_optiq_ext.lab._models import find_models
from mlx_optiq_ext.lab._supervisor import PortInUse, Status, Supervisor, free_port

from .conftest import TIMEOUT, is_alive

MODELS = find_models()


class Watched:
    """A supervisor, and every state that it told."""

    def __init__(self, back_off: tuple[float, ...]):
        self.told: list[dict[str, Any]] = []
        feed = Feed()
        feed.publish = self._hear  # type: ignore[method-assign]
        self._changed = asyncio.Event()
        self.supervisor = Supervisor(feed, back_off)

    def _hear(self, name: str, data: Any) -> None:
        if name == "state":
            self.told.append(dict(data))
            self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()

    async def until_status(self, status: Status) -> None:
        await self.until(lambda: self.supervisor.state.status == status)

    @property
    def statuses(self) -> list[str]:
        """Those told, without repetition."""
        found = [state["status"] for state in self.told]
        return [s for i, s in enumerate(found) if i == 0 or s != found[i - 1]]


@asynccontextmanager
async def watched(*back_off: float) -> AsyncIterator[Watched]:
    found = Watched(back_off)
    try:
        yield found
    finally:
        await found.supervisor.close()


def launch(**settings: Any) -> Launch:
    given = {"model": "demo/qwen", "mtp": True, "port": free_port()} | settings
    return read_launch(given, MODELS, {})


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 3 * TIMEOUT))


def test_a_server_is_ready_when_it_has_answered_and_stopped_when_it_has_ended():
    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch(api_key="secret"))
            await found.until_status(Status.READY)
            pid = found.supervisor.state.pid
            assert pid is not None
            assert any(state["memory_bytes"] for state in found.told)
            assert is_alive(pid)
            await found.supervisor.stop()
            assert not is_alive(pid)
            assert found.supervisor.state.pid is None
        assert found.statuses == ["starting", "ready", "stopping", "stopped"]

    run(test)


def test_a_server_that_is_killed_is_started_again_until_that_is_of_no_use():
    async def test() -> None:
        async with watched(0.01) as found:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            first = found.supervisor.state.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await found.until_status(Status.WAITING)
            state = found.supervisor.state
            assert state.problem == "the server ended: killed by SIGKILL"
            assert state.retry_at is not None
            await found.until_status(Status.READY)
            second = found.supervisor.state.pid
            assert second not in (None, first)
            assert found.supervisor.state.problem is None
            os.kill(second or 0, signal.SIGKILL)
            await found.until_status(Status.FAILED)

    run(test)


def test_a_server_that_never_answered_is_not_started_again(headless):
    models = find_models([headless])

    async def test() -> None:
        async with watched(0.01) as found:
            settings = {"model": str(headless), "mtp": True, "port": free_port()}
            await found.supervisor.start(read_launch(settings, models, {}))
            await found.until_status(Status.FAILED)
            state = found.supervisor.state
            assert "there is no MTP head" in f"{state.problem} {state.last_lines}"
            assert state.pid is None
        assert "ready" not in found.statuses

    run(test)


def test_a_port_in_use_is_told_and_what_runs_goes_on():
    async def test() -> None:
        async with watched() as found:
            own = launch()
            await found.supervisor.start(own)
            await found.until_status(Status.READY)
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
                with pytest.raises(PortInUse, match=f"port {port} is in use"):
                    await found.supervisor.start(launch(port=port))
            assert found.supervisor.state.status == Status.READY
            assert found.supervisor.launch is own

    run(test)


def test_switching_ends_one_server_and_starts_the_other_on_its_port():
    async def test() -> None:
        async with watched() as found:
            port = free_port()
            await found.supervisor.start(launch(port=port))
            await found.until_status(Status.READY)
            first = found.supervisor.state.pid
            assert first is not None
            await found.supervisor.start(
                launch(
                    model="demo/gemma",
                    mtp=False,
                    drafter="demo/gemma-assistant",
                    port=port,
                )
            )
            assert not is_alive(first)
            await found.until_status(Status.READY)
            settings = found.supervisor.state.settings
            assert settings is not None
            assert settings["model"] == "demo/gemma"

    run(test)


def test_a_server_is_stopped_while_it_is_loading():
    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch())
            await found.until(lambda: found.supervisor.state.pid is not None)
            pid = found.supervisor.state.pid
            await found.supervisor.stop()
            assert not is_alive(pid or 0)
            assert found.supervisor.state.status == Status.STOPPED

    run(test)
