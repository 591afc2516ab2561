"""What requests took: one line each in the log, and counters for Prometheus."""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..decoding import SpeculationStats
from ._errors import APIError

if TYPE_CHECKING:
    from ._exchange import Exchange

# Seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


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
    """

    route: str = "other"
    status: int = 0
    started: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    last_token: float = 0.0
    num_tokens: int = 0

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
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._generation = counter("generation_tokens", "Tokens generated")
        self._waiting = gauge("num_requests_waiting", "Requests in the line")
        self._running = gauge("num_requests_running", "Requests being generated")
        self._first = histogram(
            "time_to_first_token_seconds", "From the headers to the first token"
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From the headers to the end of the reply"
        )
        self._drafts = counter("spec_decode_num_drafts", "Rounds of speculation")
        self._drafted = counter("spec_decode_num_draft_tokens", "Draft tokens verified")
        self._accepted = counter(
            "spec_decode_num_accepted_tokens", "Draft tokens emitted"
        )
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens emitted, by position in the draft",
            "position",
        )

    def text(self, num_waiting: int, num_running: int) -> bytes:
        """Everything in Prometheus' text format."""
        self._waiting.set(num_waiting)
        self._running.set(num_running)
        return self._render(self._registry)

    def add(self, measured: Measurement) -> None:
        """Count a request that is over."""
        self._requests.labels(measured.route, str(measured.status)).inc()

    def add_generation(self, measured: Measurement, num_prompt_tokens: int) -> None:
        """Count what was generated for a request that is over."""
        self._prompt.inc(num_prompt_tokens)
        self._generation.inc(measured.num_tokens)
        self._latency.observe(time.monotonic() - measured.started)
        if measured.num_tokens:
            self._first.observe(measured.first_token - measured.started)

    def add_speculation(self, stats: SpeculationStats) -> None:
        """Count what speculation did for a sequence of a request that is over."""
        self._drafts.inc(stats.num_rounds)
        self._drafted.inc(stats.num_drafted)
        self._accepted.inc(stats.num_accepted)
        for position, number in enumerate(stats.num_accepted_per_position):
            self._accepted_at.labels(str(position)).inc(number)


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
    started = [each for each in exchange.sequences if each.num_prompt_tokens]
    if not started:
        return
    num_prompt_tokens = started[0].num_prompt_tokens
    found = [each.arguments.stats for each in started if each.arguments.stats]
    logging.info(
        "%s %s: %s prompt tokens (%s cached), %s generated, %.1f tokens/s, "
        "draft_n %s, accepted %s",
        measured.route,
        measured.status,
        num_prompt_tokens,
        started[0].num_cached_tokens,
        measured.num_tokens,
        measured.tokens_per_second,
        sum(stats.num_drafted for stats in found),
        sum(stats.num_accepted for stats in found),
    )
    if metrics is not None:
        metrics.add_generation(measured, num_prompt_tokens)
        for stats in found:
            metrics.add_speculation(stats)


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
