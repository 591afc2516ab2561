"""Everything that a Lab has, and what its pages can have done."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2

from .._options import MAX_DRAFT_TOKENS
from ._checks import Checks
from ._feed import Event, Feed
from ._flags import Flag, ask_for_flags
from ._jobs import Around, Job
from ._launch import Launch, number, read_launch
from ._models import LocalModel, find_models
from ._options import LabOptions
from ._samples import Samples
from ._supervisor import Status, Supervisor

HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
DEFAULT_PORT = 8080
UP = (Status.STARTING, Status.READY, Status.SILENT, Status.WAITING)


def is_folder(name: str) -> bool:
    """Whether a model is named by its folder."""
    return Path(name).expanduser().is_dir()


def named_model(options: LabOptions) -> str | None:
    """What the list of models calls the model of the command line.

    Raises:
        ValueError: If it is neither a folder with a model nor a Hub id.
    """
    name = options.model
    if name is None:
        return None
    if is_folder(name):
        path = Path(name).expanduser().resolve()
        if str(path) in find_models([path]):
            return str(path)
        raise ValueError(f"there is no model in {path}: no config.json with weights")
    if HUB_ID.fullmatch(name):
        return name
    raise ValueError(f"expected a folder or a Hub id (ORG/NAME), got {name!r}")


def bench_command(launch: Launch, body: Any) -> list[str]:
    """The command line that measures what a server was started with.

    Raises:
        ValueError: If the body is not one of ``start_bench``.
    """
    if not isinstance(body, dict):
        raise ValueError(f"expected an object, got {body!r}")
    depth = number("max_depth", body.get("max_depth", 4), 1, MAX_DRAFT_TOKENS)
    command = ["mlx-optiq-ext", "bench", "--model", launch.model.source, *launch.draft]
    command += ["--max-depth", str(depth), "--json"]
    if (tokens := body.get("tokens")) is None:
        return command
    return [*command, "--tokens", str(number("tokens", tokens, 2, 100_000))]


class Refused(Exception):
    """Something that is understood and cannot be done now."""


class Lab:
    """One supervised server, the models of this machine, and who watches.

    Args:
        options (LabOptions): What it shows.
    """

    def __init__(self, options: LabOptions):
        self._options = options
        self._named = named_model(options)
        self._tasks: list[asyncio.Task[Any]] = []
        self._leaving: asyncio.Task[None] | None = None
        self._is_closing = False
        self._wanted: Launch | None = None  # by the page that asked last
        self.feed = Feed()
        self.models: dict[str, LocalModel] = {}
        self.flags: dict[str, Flag] = {}
        self.supervisor = Supervisor(self.feed)
        self.samples = Samples(self.feed, self.supervisor)
        self.checks = Checks(self.feed)
        self.bench = Job("bench", self.feed)
        self.downloads = Job("download", self.feed)
        self.client = httpx2.AsyncClient(timeout=None, trust_env=False)

    async def open(self) -> None:
        """Begin: look for models, and start the server that the command line named."""
        self.look_for_models()
        for work in (self.samples.follow(), self._begin()):
            self._tasks.append(asyncio.create_task(work))

    def leave(self) -> None:
        """End what is streamed to pages, so that these can be let go."""
        self._is_closing = True
        self.feed.close()
        self._leaving = asyncio.create_task(self.supervisor.stop())

    async def close(self) -> None:
        """Stop everything that runs."""
        self._is_closing = True
        self.feed.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.checks.close()
        await self.bench.stop()
        await self.downloads.stop()
        await self.supervisor.close()
        await self.client.aclose()

    def snapshot(self) -> list[Event]:
        """What a page has to know when it comes."""
        jobs = [job for job in (self.bench, self.downloads) if job.state is not None]
        return [
            ("models", self._models_as_json()),
            ("flags", [asdict(flag) for flag in self.flags.values()]),
            *(("check", report) for report in self.checks.reports),
            ("lines", list(self.supervisor.log.lines)),
            ("samples", list(self.samples.samples)),
            *((job.name, asdict(job.state)) for job in jobs if job.state),
            ("state", self.supervisor.state.as_json()),
        ]

    def look_for_models(self) -> None:
        """Read the list of models again."""
        named = [Path(self._named)] if self._named and is_folder(self._named) else []
        self.models = find_models([*named, *self._options.folders])
        self.checks.forget()
        self.feed.publish("models", self._models_as_json())
        self.checks.ask_all(list(self.models.values()))

    def read(self, settings: Any) -> Launch:
        """What a page wants served.

        Raises:
            ValueError: If it cannot be understood.
        """
        return read_launch(settings, self.models, self.flags)

    def read_pair(self, body: Any) -> tuple[LocalModel, LocalModel | None]:
        """The model and drafter that a page asks about.

        Raises:
            ValueError: If they are not in the list.
        """
        if not isinstance(body, dict):
            raise ValueError(f"expected an object, got {body!r}")
        launch = self.read({key: body.get(key) for key in ("model", "drafter")})
        return launch.model, launch.drafter

    async def start(self, launch: Launch) -> None:
        """Start a server in place of the one that runs.

        Raises:
            Refused: If doctor says that it will not work, a benchmark runs, or
              something else was asked for while doctor looked.
            PortInUse: If it cannot listen.
        """
        self._wanted = launch
        if problem := await self.checks.refuse(launch):
            raise Refused(problem)
        if self._wanted != launch:
            raise Refused("something else was asked for in the meantime")
        if self.bench.is_running:
            raise Refused("a benchmark is running: it would measure both")
        await self.supervisor.start(launch)

    async def stop(self) -> None:
        """Stop the server, if one runs or is about to."""
        self._wanted = None
        await self.supervisor.stop()

    def start_bench(self, body: Any) -> None:
        """Measure the model that is loaded, or was last.

        Args:
            body (dict): ``max_depth``, ``tokens`` of each answer at most, and whether
              the server is stopped meanwhile.

        Raises:
            Refused: If there is none, it does not speculate, or one is measured.
            ValueError: If the body is not as described.
        """
        launch = self.supervisor.launch
        if launch is None or not launch.is_speculative:
            raise Refused("start a server with a drafter first: it is what is measured")
        if self.bench.is_running:
            raise Refused("a benchmark is running")
        command = bench_command(launch, body)
        drafter = "MTP head" if launch.drafter is None else launch.drafter.name
        about = {"model": launch.model.name, "drafter": drafter}
        pauses = body.get("pauses", True) is True
        around = self._paused(launch) if pauses else contextlib.nullcontext()
        self.bench.start(command, about, around)

    @asynccontextmanager
    async def _paused(self, launch: Launch) -> AsyncIterator[None]:
        """The server is stopped meanwhile, if it runs or is to be started again."""
        is_up = self.supervisor.state.status in UP
        try:
            await self.supervisor.stop()
            yield
        finally:
            if is_up and not self._is_closing:
                await self.supervisor.try_to_start(launch)

    def download(self, body: Any) -> None:
        """Get a model from the Hub.

        Raises:
            ValueError: If the body names none.
            Refused: If another one is on its way.
        """
        repo_id = body.get("repo_id") if isinstance(body, dict) else None
        if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
            raise ValueError(f"expected the id of a model, ORG/NAME, got {repo_id!r}")
        if self.downloads.is_running:
            raise Refused("a download is running")
        self._get(repo_id, self._looking_again())

    @asynccontextmanager
    async def _looking_again(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self.look_for_models()

    @asynccontextmanager
    async def _serving_it(self, name: str) -> AsyncIterator[None]:
        async with self._looking_again():
            yield
        if name in self.models:
            await self._serve(name)

    async def _begin(self) -> None:
        self.flags = await ask_for_flags()
        self.feed.publish("flags", [asdict(flag) for flag in self.flags.values()])
        if self._named is None:
            return
        if self._named in self.models:
            await self._serve(self._named)
        else:
            self._get(self._named, self._serving_it(self._named))

    async def _serve(self, name: str) -> None:
        report = await self.checks.ask(self.models[name], None)
        settings = {"model": name, "mtp": report["works"], "port": DEFAULT_PORT}
        await self.supervisor.try_to_start(self.read(settings))

    def _get(self, repo_id: str, around: Around) -> None:
        command = ["hf", "download", repo_id]
        about = {"repo_id": repo_id}
        self.downloads.start(command, about, around, environment={})

    def _models_as_json(self) -> list[dict[str, Any]]:
        return [model.as_json() for model in self.models.values()]
