"""What ``mlx-optiq-ext doctor`` knows of the models, without decoding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from ._feed import Feed
from ._launch import Launch
from ._models import MODEL, LocalModel, Version
from ._process import Child, describe_exit

Report = dict[str, Any]
Pair = tuple[str, str | None]  # the names of a model and of a drafter, None for its own


class Checks:
    """Asks ``doctor`` about each pair of model and drafter, one after the other.

    It is asked again about a pair when files of it have changed.

    Args:
        feed (Feed): Is told each answer.
    """

    def __init__(self, feed: Feed):
        self._feed = feed
        self._answers: dict[Pair, asyncio.Task[Report]] = {}
        self._versions: dict[Pair, list[Version]] = {}
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def reports(self) -> list[Report]:
        """The answers so far."""
        return [a.result() for a in self._answers.values() if _is_answered(a)]

    async def ask(self, model: LocalModel, drafter: LocalModel | None) -> Report:
        """What stands for or against a pair."""
        pair = (model.name, drafter.name if drafter else None)
        versions = [each.version for each in (model, drafter) if each]
        if pair not in self._answers or self._versions[pair] != versions:
            self._versions[pair] = versions
            task = asyncio.create_task(self._run(pair, model, drafter))
            self._answers[pair] = task
        # Whoever asked may leave; the answer is for all.
        return await asyncio.shield(self._answers[pair])

    def ask_all(self, models: Sequence[LocalModel]) -> None:
        """Ask about every model and its own head, behind what a page asks for."""
        task = asyncio.create_task(self._go_through(models))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def refuse(self, launch: Launch) -> str | None:
        """Why a server is not to be started, None if nothing stands against it."""
        if not launch.is_speculative:
            return None
        report = await self.ask(launch.model, launch.drafter)
        return None if report["works"] else report["problem"]

    def forget(self) -> None:
        """Ask again about everything: files may have changed."""
        self._answers = {p: a for p, a in self._answers.items() if not a.done()}

    async def close(self) -> None:
        """Ask nothing more."""
        tasks = [*self._tasks, *self._answers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _go_through(self, models: Sequence[LocalModel]) -> None:
        for model in models:
            if model.kind == MODEL:
                await self.ask(model, None)

    async def _run(
        self, pair: Pair, model: LocalModel, drafter: LocalModel | None
    ) -> Report:
        async with self._turn:
            report = await _ask_doctor(model, drafter)
        report |= {"name": pair[0], "drafter_name": pair[1]}
        self._feed.publish("check", report)
        return report


async def _ask_doctor(model: LocalModel, drafter: LocalModel | None) -> Report:
    command = ["mlx-optiq-ext", "doctor", model.source, "--no-test", "--json"]
    command += ["--draft", drafter.source] if drafter else []
    log: list[str] = []
    output: list[str] = []
    try:
        async with Child.running(command, log.append, output.append) as child:
            ending = describe_exit(await child.wait())
        report: Report = json.loads("\n".join(output))
        return report
    except OSError as error:
        problem = f"doctor cannot be asked: {error}"
    except ValueError:
        problem = f"doctor ended ({ending}): {' '.join(log[-3:])}"
    return {"works": False, "problem": problem, "to_do": None, "verdict": problem}


def _is_answered(answer: asyncio.Task[Report]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None
