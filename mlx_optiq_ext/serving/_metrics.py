"""What requests took: one line each in the log, and counters for Prometheus."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decoding import SpeculationStats
from ._errors import APIError

if TYPE_CHECKING:
    from ._exchange import Exchange
    from ._generation import Sequence

Totals = dict[tuple[str, ...], int]  # by the name of a counter and a label's value

# Seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


FIRST_TOKEN = "From the headers to the first token"
LATENCY = "From the headers to the end of the reply"

# What grows while replies are generated: the text for each name, and a label if there
# is a number for each of several values.
COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("Tokens of prompts",),
    "prompt_tokens_cached": ("Tokens of prompts found in the prompt cache",),
    "generation_tokens": ("Tokens generated",),
    "spec_decode_num_drafts": ("Rounds of speculation",),
    "spec_decode_num_draft_tokens": ("Draft tokens verified",),
    "spec_decode_num_accepted_tokens": ("Draft tokens emitted",),
    "spec_decode_num_draft_tokens_per_pos": (
        "Draft tokens verified, by position in the draft",
        "position",
    ),
    "spec_decode_num_accepted_tokens_per_pos": (
        "Draft tokens emitted, by position in the draft",
        "position",
    ),
    "spec_decode_num_target_calls_per_depth": (
        "Forward passes that emitted tokens, by the draft tokens in them",
        "depth",
    ),
    "spec_decode_num_draft_tokens_per_source": (
        "Draft tokens verified, by what proposed them",
        "source",
    ),
    "spec_decode_num_accepted_tokens_per_source": (
        "Draft tokens emitted, by what proposed them",
        "source",
    ),
}


@dataclass
class Measurement:
    """What one request took.

    Args:
        route (str): The path of the route that answered it, with placeholders.
        status (int): The HTTP status of the answer, 0 if none was sent.
        started (float): When its headers were read, in seconds of a monotonic clock.
        first_token (float): When its first token came, 0 if none came.
        last_token (float): When its last token came.
        num_tokens (int): The number of tokens generated for it.
        counted (dict): What the counters have of this request.
    """

    route: str = "other"
    status: int = 0
    started: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    last_token: float = 0.0
    num_tokens: int = 0
    counted: Totals = field(default_factory=dict)

    def count(self) -> None:
        """Count a token that was generated just now."""
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.num_tokens += 1

    @property
    def tokens_per_second(self) -> float:
        """The speed at which the tokens after the first came."""
        seconds = self.last_token - self.first_token
        return (self.num_tokens - 1) / seconds if seconds > 0 else 0.0


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        registry = self._registry = prometheus.CollectorRegistry()
        self._render = prometheus.generate_latest
        self.content_type = prometheus.CONTENT_TYPE_LATEST

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str) -> prometheus.Histogram:
            return prometheus.Histogram(name, text, registry=registry, buckets=BUCKETS)

        def gauge(name: str, text: str) -> prometheus.Gauge:
            return prometheus.Gauge(name, text, registry=registry)

        self._requests = counter("requests", "Requests answered", "route", "status")
        self._counters = {name: counter(name, *rest) for name, rest in COUNTERS.items()}
        self._lock = threading.Lock()
        self._waiting = gauge("num_requests_waiting", "Requests in the line")
        self._running = gauge("num_requests_running", "Requests being generated")
        self._first = histogram("time_to_first_token_seconds", FIRST_TOKEN)
        self._latency = histogram("e2e_request_latency_seconds", LATENCY)
        self._active = gauge("mlx_active_memory_bytes", "Memory that arrays take")
        self._peak = gauge("mlx_peak_memory_bytes", "The most that arrays have taken")

    def text(self, num_waiting: int, exchanges: Collection[Exchange]) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            num_waiting (int): Requests in the line.
            exchanges (Collection): The exchanges for which something is generated now;
              what they have so far is counted.
        """
        for exchange in list(exchanges):
            self._count(exchange)
        self._waiting.set(num_waiting)
        self._running.set(len(exchanges))
        self._active.set(mx.get_active_memory())
        self._peak.set(mx.get_peak_memory())
        return self._render(self._registry)

    def add(self, measured: Measurement) -> None:
        """Count a request that is over."""
        self._requests.labels(measured.route, str(measured.status)).inc()

    def add_generation(self, exchange: Exchange) -> None:
        """Count what was generated for a request that is over."""
        measured = exchange.measured
        self._count(exchange)
        self._latency.observe(time.monotonic() - measured.started)
        if measured.num_tokens:
            self._first.observe(measured.first_token - measured.started)

    def _count(self, exchange: Exchange) -> None:
        """Add what a request has more of than when it was last counted."""
        counted = exchange.measured.counted
        with self._lock:
            for (name, *label), total in _totals(exchange).items():
                counter = self._counters[name]
                added = total - counted.get((name, *label), 0)
                (counter.labels(*label) if label else counter).inc(added)
                counted[name, *label] = total


def _totals(exchange: Exchange) -> Totals:
    stats = stats_of(exchange)
    # The choices of a reply have the prompt in common.
    first = next(iter(_started(exchange)), None)
    totals: Totals = {
        ("prompt_tokens",): first.num_prompt_tokens if first else 0,
        ("prompt_tokens_cached",): first.num_cached_tokens if first else 0,
        ("generation_tokens",): exchange.measured.num_tokens,
        ("spec_decode_num_drafts",): stats.num_rounds,
        ("spec_decode_num_draft_tokens",): stats.num_drafted,
        ("spec_decode_num_accepted_tokens",): stats.num_accepted,
    }
    for name, numbers in (
        ("spec_decode_num_draft_tokens_per_pos", stats.num_drafted_per_position),
        ("spec_decode_num_accepted_tokens_per_pos", stats.num_accepted_per_position),
        ("spec_decode_num_target_calls_per_depth", stats.num_calls_per_depth),
    ):
        totals |= {(name, str(at)): number for at, number in enumerate(numbers)}
    for name, counts in (
        ("spec_decode_num_draft_tokens_per_source", stats.num_drafted_per_source),
        ("spec_decode_num_accepted_tokens_per_source", stats.num_accepted_per_source),
    ):
        totals |= {(name, source): number for source, number in list(counts.items())}
    return totals


def stats_of(exchange: Exchange) -> SpeculationStats:
    """What speculation did for all sequences of a request."""
    found = [each.arguments.stats for each in _started(exchange)]
    return SpeculationStats.total(stats for stats in found if stats)


def _started(exchange: Exchange) -> list[Sequence]:
    return [each for each in list(exchange.sequences) if each.num_prompt_tokens]


def make_metrics() -> Metrics | None:
    """Counters, None where the package that they need is not installed."""
    if importlib.util.find_spec("prometheus_client") is None:
        return None
    return Metrics()


def finish(exchange: Exchange, metrics: Metrics | None) -> None:
    """Log and count a request that is over."""
    measured = exchange.measured
    if metrics is not None:
        metrics.add(measured)
    if not (started := _started(exchange)):
        return
    stats = stats_of(exchange)
    logging.info(
        "%s %s: %s prompt tokens (%s cached), %s generated, %.1f tokens/s, "
        "draft_n %s, accepted %s",
        measured.route,
        measured.status,
        started[0].num_prompt_tokens,
        started[0].num_cached_tokens,
        measured.num_tokens,
        measured.tokens_per_second,
        stats.num_drafted,
        stats.num_accepted,
    )
    if metrics is not None:
        metrics.add_generation(exchange)


def require(metrics: Metrics | None) -> Metrics:
    """The counters of a server that has them.

    Raises:
        APIError: 501, if it has none.
    """
    if metrics is None:
        raise APIError(
            501, "metrics need prometheus-client: pip install 'mlx-optiq-ext[metrics]'"
        )
    return metrics
