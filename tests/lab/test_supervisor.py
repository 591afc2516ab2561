"""The state that is told is that of the process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from mlx_optiq_ext.lab._feed import Feed
from mlx_optiq_ext.lab._launch import Launch, read_launch
from mlx_optiq_ext.lab._models import find_models
from mlx_optiq_ext.lab._supervisor import PortInUse, Status, Supervisor, free_port

from .conftest import TIMEOUT, eventually, is_alive

MODELS = find_models()


class Watched:
    """A supervisor, and every state that it told."""

    def __init__(self, back_off: tuple[float, ...], silence: float):
        self.told: list[dict[str, Any]] = []
        feed = Feed()
        feed.publish = self._hear  # type: ignore[method-assign]
        self._changed = asyncio.Event()
        self.supervisor = Supervisor(feed, back_off, silence)

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
async def watched(*back_off: float, silence: float = 30) -> AsyncIterator[Watched]:
    found = Watched(back_off, silence)
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


def test_a_server_that_ends_while_it_is_started_again_gets_its_other_attempts():
    async def test() -> None:
        async with watched(0.01, 0.01) as found:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            for _ in range(2):
                pid = found.supervisor.state.pid
                os.kill(pid or 0, signal.SIGKILL)
                await found.until(
                    lambda p=pid: found.supervisor.state.pid not in (None, p)
                )
                assert found.supervisor.state.status == Status.STARTING
            await found.until_status(Status.READY)
            assert found.supervisor.state.num_restarts == 2

    run(test)


def test_a_server_that_does_not_answer_any_more_is_told():
    async def test() -> None:
        async with watched(silence=0.5) as found:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            pid = found.supervisor.state.pid or 0
            os.kill(pid, signal.SIGSTOP)
            await found.until_status(Status.SILENT)
            assert found.supervisor.state.problem
            os.kill(pid, signal.SIGCONT)
            await found.until_status(Status.READY)
            assert found.supervisor.state.problem is None
            os.kill(pid, signal.SIGSTOP)
            await found.until_status(Status.SILENT)
        assert not is_alive(pid)

    run(test)


def test_a_server_that_does_not_end_when_asked_is_ended(also):
    also("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")

    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            pid = found.supervisor.state.pid or 0
            await found.supervisor.stop()
            assert not is_alive(pid)
            assert found.supervisor.state.status == Status.STOPPED

    run(test)


def test_the_end_of_a_server_is_seen_though_what_it_started_goes_on(also, tmp_path):
    also(f"""
import pathlib, subprocess
pid = subprocess.Popen(["sleep", "600"]).pid
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(pid))
""")

    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            os.kill(found.supervisor.state.pid or 0, signal.SIGKILL)
            await found.until_status(Status.FAILED)

    run(test)
    assert eventually(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_what_else_listens_at_the_port_is_not_taken_for_the_server(also):
    """It may begin to between the check of the port and the server's own start."""
    also("import time; time.sleep(2)")

    async def answer(reader: Any, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def test() -> None:
        async with watched(0.01) as found:
            own = launch()
            await found.supervisor.start(own)
            async with await asyncio.start_server(answer, "127.0.0.1", own.port):
                await found.until_status(Status.FAILED)
            assert "exit code" in (found.supervisor.state.problem or "")
        assert "ready" not in found.statuses

    run(test)


def test_a_server_that_is_being_loaded_is_not_loaded_anew_for_a_second_tab():
    async def test() -> None:
        async with watched() as found:
            settings = {"port": free_port()}
            await found.supervisor.start(launch(**settings))
            await found.until(lambda: found.supervisor.state.pid is not None)
            pid = found.supervisor.state.pid
            await found.supervisor.start(launch(**settings))
            await found.until_status(Status.READY)
            assert found.supervisor.state.pid == pid
            await found.supervisor.start(launch(**settings, num_draft_tokens=2))
            await found.until_status(Status.READY)
            assert found.supervisor.state.pid != pid

    run(test)


def test_the_key_of_a_server_is_not_in_its_command_line():
    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch(api_key="very-secret"))
            await found.until_status(Status.READY)
            command = [
                "ps",
                "-ww",
                "-o",
                "args=",
                "-p",
                str(found.supervisor.state.pid),
            ]
            arguments = subprocess.check_output(command, text=True)
            assert "mlx_lm.server" in arguments
            assert "very-secret" not in arguments

    run(test)


def test_a_key_in_the_environment_of_the_lab_is_not_that_of_its_server(monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT_API_KEY", "of somebody else")

    async def test() -> None:
        async with watched() as found:
            await found.supervisor.start(launch())
            await found.until(
                lambda: found.supervisor.state.status in (Status.READY, Status.FAILED)
            )
            assert found.supervisor.state.problem is None

    run(test)


def test_a_page_elsewhere_cannot_ask_the_server_itself():
    async def test() -> None:
        async with watched() as found, httpx2.AsyncClient() as client:
            await found.supervisor.start(launch())
            await found.until_status(Status.READY)
            url = f"{found.supervisor.state.url}/v1/completions"
            headers = {"origin": "https://evil.example"}
            body = {"prompt": "Hi", "max_tokens": 1}
            reply = await client.post(url, json=body, headers=headers)
            assert reply.status_code == 403
            assert "access-control-allow-origin" not in reply.headers
            assert (await client.post(url, json=body)).status_code == 200

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
