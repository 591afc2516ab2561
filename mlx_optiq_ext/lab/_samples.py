"""The server's own metrics, read once a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from ._feed import Feed
from ._process import memory_of
from ._supervisor import Status, Supervisor

SECONDS = 1.0
MAX_SAMPLES = 600
Sample = dict[str, Any]
Values = dict[tuple[str, str], float]  # by name and label


class Samples:
    """Follows the server that runs.

    Args:
        feed (Feed): Is told each sample.
        supervisor (Supervisor): Knows the server.
    """

    def __init__(self, feed: Feed, supervisor: Supervisor):
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._feed = feed
        self._supervisor = supervisor
        self._pid: int | None = None

    async def follow(self) -> None:
        """Take samples for as long as the Lab runs."""
        async with httpx2.AsyncClient(timeout=10.0, trust_env=False) as client:
            while True:
                if self._supervisor.state.status == Status.READY:
                    with contextlib.suppress(httpx2.HTTPError, ValueError):
                        await self._take(client)
                await asyncio.sleep(SECONDS)

    async def _take(self, client: httpx2.AsyncClient) -> None:
        launch, pid = self._supervisor.launch, self._supervisor.state.pid
        if launch is None or pid is None:
            return
        reply = await client.get(f"{launch.url}/metrics", headers=launch.headers)
        if not reply.is_success:
            return
        if pid != self._pid:  # Another server counts from zero.
            self._pid = pid
            self.samples.clear()
            self._feed.publish("samples", [])
        sample = {
            "time": time.time(),
            "memory": await memory_of(pid),
            **summarize(read_values(reply.text)),
        }
        self.samples.append(sample)
        self._feed.publish("sample", sample)


def read_values(text: str) -> Values:
    """Everything in Prometheus' text format, by name and first label."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def summarize(values: Values) -> Sample:
    """What the page plots, as totals since the server was started."""

    def total(name: str) -> float:
        return values.get((name, ""), 0.0)

    def by_label(name: str) -> list[float]:
        found = {int(key): v for (n, key), v in values.items() if n == name and key}
        return [found.get(at, 0.0) for at in range(max(found, default=-1) + 1)]

    return {
        "generated": total("generation_tokens_total"),
        "prompt": total("prompt_tokens_total"),
        "cached": total("prompt_tokens_cached_total"),
        "running": total("num_requests_running"),
        "waiting": total("num_requests_waiting"),
        "rounds": total("spec_decode_num_drafts_total"),
        "drafted": by_label("spec_decode_num_draft_tokens_per_pos_total"),
        "accepted": by_label("spec_decode_num_accepted_tokens_per_pos_total"),
        "calls": by_label("spec_decode_num_target_calls_per_depth_total"),
        "arrays": total("mlx_active_memory_bytes"),
        "peak": total("mlx_peak_memory_bytes"),
    }
