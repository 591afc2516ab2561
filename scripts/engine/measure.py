"""Measures what a generation costs, and what it could cost at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from mlx_optiq_ext._costs import Clock, copy_cache
from mlx_optiq_ext._options import NumDraftTokens
from mlx_optiq_ext.decoding._rows import Proposal, Verifier
from mlx_optiq_ext.drafters import Drafter
from mlx_optiq_ext.rollback import (
    Tape,
    Transaction,
    has_known_recurrence,
    prepare_recurrence,
)


@dataclass(frozen=True)
class Run:
    """One generation, without its first token.

    Args:
        tokens (list[int]): All tokens, the first included.
        seconds (float): The seconds from the first token to the last.
        stats (SpeculationStats): The counts, which are empty for plain decoding.
    """

    tokens: list[int]
    seconds: float
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / (len(self.tokens) - 1)

    @property
    def num_rounds(self) -> int:
        """The number of forward passes, without that of the first token."""
        return self.stats.num_target_calls - 1

    @property
    def rounds_by_depth(self) -> dict[int, int]:
        """The number of these passes by the number of draft tokens verified."""
        drafted = [self.num_rounds, *self.stats.num_drafted_per_position, 0]
        return {
            depth: drafted[depth] - drafted[depth + 1]
            for depth in range(len(drafted) - 1)
        }


@dataclass(frozen=True)
class Start:
    """The state that every generation starts from.

    Args:
        model (nn.Module): The target.
        cache (list): The prompt cache of the target, which stays as it is.
        tokens (mx.array): The tokens in it, ``[num_tokens]``; the last is fed again.
        clock (Callable[[], float]): Returns the time in seconds.
    """

    model: nn.Module
    cache: list[Any]
    tokens: mx.array
    clock: Clock

    @property
    def options(self) -> dict[str, Any]:
        return {
            "prompt": self.tokens[-1:],
            "model": self.model,
            "prompt_cache": copy_cache(self.cache),
        }


def run_plain(start: Start, num_tokens: int) -> Run:
    steps = generate_step(**start.options, max_tokens=num_tokens)
    return Run(*_consume((token for token, _ in steps), start.clock))


def run_speculative(
    start: Start, num_tokens: int, drafter: Drafter, depth: NumDraftTokens
) -> Run:
    stats = SpeculationStats()
    steps = spec_generate_step(
        **start.options,
        drafter=drafter,
        num_draft_tokens=depth,
        max_tokens=num_tokens,
        stats=stats,
    )
    return Run(*_consume((token for token, *_ in steps), start.clock), stats)


def _consume(tokens: Iterable[int], clock: Clock) -> tuple[list[int], float]:
    taken: list[int] = []
    start = end = 0.0
    for token in tokens:
        end = clock()
        if not taken:
            start = end
        taken.append(token)
    return taken, end - start


def allowed_seconds(
    run: Run, verify: Mapping[int, float], draft: Mapping[int, float]
) -> float:
    """Compute what rounds would take if they cost their passes and drafts alone.

    Args:
        run (Run): The run, with its numbers of rounds by numbers of draft tokens.
        verify (Mapping[int, float]): The seconds of a pass, by its number of rows.
        draft (Mapping[int, float]): The seconds of a draft, by its number of tokens.
    """
    return sum(
        num_rounds * (verify[1 + depth] + draft[depth])
        for depth, num_rounds in run.rounds_by_depth.items()
        if num_rounds
    )


def measure_draft_seconds(
    start: Start, drafter: Drafter, depth: int, num_repeats: int
) -> float:
    """Time drafts that are built before the clock starts; the median in seconds."""
    model, cache = start.model, copy_cache(start.cache)
    num_tokens = start.tokens.size
    session = drafter.open(list(cache), len(cache), num_tokens)
    states = None
    if drafter.reads_hidden_states:
        states = model.hidden_states(start.tokens[None], cache=cache)
        mx.eval(states)
    session.prefill(start.tokens, states)
    last_state = None if states is None else states[:, -1:]
    seconds = []
    for _ in range(num_repeats + 1):
        proposal = Proposal(Verifier(), None)
        session.draft(start.tokens[-1:], last_state, depth, proposal)
        began = start.clock()
        mx.eval(proposal.tokens)
        seconds.append(start.clock() - began)
    return statistics.median(seconds[1:])


def measure_rollback_seconds(start: Start, num_rows: int, num_repeats: int) -> float:
    """Time taking back all rows of a pass but the first; the median in seconds."""
    seconds = []
    is_taped = has_known_recurrence(start.model)
    if is_taped:
        prepare_recurrence(start.model)

    def forward(entries: list[Any], num: int) -> Any:
        return start.model(start.tokens[None, -num:], cache=entries)

    for _ in range(num_repeats):
        entries = copy_cache(start.cache)
        transaction = Transaction(entries, Tape() if is_taped else None)
        mx.eval(transaction.run(forward, num_rows), [e.state for e in entries])
        began = start.clock()
        transaction.keep(1)
        mx.eval([entry.state for entry in entries])
        seconds.append(start.clock() - began)
    return statistics.median(seconds)


@dataclass
class HostTime:
    """The calls in which the host waits for the device, and how long they take."""

    num_syncs: int = 0
    seconds: float = 0.0
    blocked_seconds: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """The seconds in which the host did not wait."""
        return self.seconds - self.blocked_seconds


@contextmanager
def watching_syncs() -> Iterator[HostTime]:
    """Count the calls that wait for an array, and time them."""
    host = HostTime()
    places = [(mx, "eval"), (mx, "synchronize")]
    places += [(mx.array, name) for name in ("item", "tolist", "__bool__", "__int__")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, original in originals:
            setattr(owner, name, _timed(original, host))
        start = time.perf_counter()
        yield host
        host.seconds = time.perf_counter() - start
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(call: Callable[..., Any], host: HostTime) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            host.num_syncs += 1
            host.blocked_seconds += time.perf_counter() - start

    return timed
