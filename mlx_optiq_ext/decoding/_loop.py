"""The speculative decode loop, for one sequence or several.

One turn of the loop drafts for all sequences, verifies their drafts in one pass of the
target, accepts by the rule of each, and rolls each back to what it accepted. The next
pass is under way before the tokens of a turn are handed out, and a turn blocks once.

Words, after vLLM: the token in place of the first rejected draft token is *recovered*;
the one after a draft that is accepted whole is the *bonus* token.

Invariant: what a sequence emits, and the cache that it leaves with, is what it would
emit and leave with alone and without drafts, whoever is decoded beside it. Between two
turns each cache can be brought to hold exactly the prompt and the tokens handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._errors import SpeculationError
from ..drafters import (
    BatchDraftSession,
    Committed,
    Drafter,
    DraftSession,
    SeparateSessions,
    together,
)
from ._caches import Caches, JointCaches, SeparateCaches
from ._depth import round_times
from ._pass import BatchProposals, Pass
from ._plan import WIDTHS, Plan, Planner, copy_times
from ._sequence import Sequence
from ._target import CacheOptions
from ._timer import RoundTimer


@dataclass
class Start:
    """A sequence whose prompt was processed, with the first token that it emits.

    Args:
        sequence (Sequence): The sequence.
        cache (list[Any]): Stock entries of the target, which hold the prompt.
        session (DraftSession): The drafter, which has seen the prompt.
        states (mx.array, optional): Of the prompt's last row, ``[1, 1, hidden]``.
        token (mx.array): Drawn from that row, ``[1]``.
        logprobs (mx.array, optional): What it was drawn from, ``[vocab]``.
        error (Exception, optional): What a sampler or a logits processor raised.
    """

    sequence: Sequence
    cache: list[Any]
    session: DraftSession
    states: mx.array | None
    token: mx.array = field(default_factory=lambda: mx.zeros(1, mx.uint32))
    logprobs: mx.array | None = None
    error: Exception | None = None

    @property
    def all_logprobs(self) -> list[mx.array]:
        """Those of the tokens that it emits: one or, after an error, none."""
        return [] if self.logprobs is None else [self.logprobs]

    @property
    def committed(self) -> Committed:
        return Committed(self.token[None].astype(mx.uint32), self.states, [1])


class Loop:
    """Sequences that are decoded together.

    ``_ahead`` is the pass that is under way. Its rows are those of ``_riding``, some of
    which have ended since and leave before the next pass. ``sequences`` are those that
    have not, and those that are ``starting``.

    Args:
        model (nn.Module): The target.
        drafter (Drafter): What proposes tokens.
        planner (Planner): Decides how many tokens to draft, and by what.
        options (CacheOptions): How to quantise the cache of a sequence that is alone.
    """

    def __init__(
        self,
        model: nn.Module,
        drafter: Drafter,
        planner: Planner,
        options: CacheOptions,
    ):
        self._model = model
        self._drafter = drafter
        self._planner = planner
        self._options = options
        self._timer = RoundTimer()
        self._must_be_separate = False
        self._vocab_size = 0
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self.sequences: list[Sequence] = []
        self.starting: list[Start] = []
        self._riding: list[Sequence] = []
        self._ahead: Pass | None = None
        self._latest: Turn | None = None
        self._num_draft_tokens_wanted = 0
        self._catches_up = self._keeps_up = self._has_changed = False
        self._caches: Caches = self._separate_caches()
        self._session: BatchDraftSession = SeparateSessions()

    @property
    def entries(self) -> list[Any]:
        """All that is kept of the sequences, for its size."""
        starting = [entry for start in self.starting for entry in start.cache]
        return [*self._caches.entries, *self._session.entries, *starting]

    def join(self, starts: Iterable[Start]) -> None:
        """Let sequences join in the next turn."""
        for start in starts:
            self.starting.append(start)
            self.sequences.append(start.sequence)

    def remove(self, sequences: list[Sequence]) -> None:
        """Let sequences leave; they ride along in the pass that is under way."""
        self.sequences = [each for each in self.sequences if each not in sequences]
        self.starting = [x for x in self.starting if x.sequence not in sequences]
        if not self.sequences:
            self.clear()

    def turn(self) -> Turn:
        """One turn: what the pass under way emits, and the next one under way.

        While nothing is drafted, each sequence emits one token, and the next pass is
        started before it is known which. Whether there is something to copy is then
        known of the tokens before that.
        """
        self._timer.resume()
        self._latest = turn = Turn(self._ahead, self.starting)
        self._ahead, self.starting = None, []
        if not turn.is_certain:
            self._collect(turn)
        if all(sequence.has_failed for sequence in self.sequences):
            self._timer.pause()
            return turn
        committed = self._accept(turn)
        self._roll_back(committed)
        committed = self._admit(turn, committed)
        plan = self._choose(turn, committed)
        proposals = self._draft(committed, plan)
        self._verify(turn, committed, proposals)
        self._collect(turn)
        self._timer.pause()
        return turn

    def leave(self, sequence: Sequence, num_tokens: int) -> list[Any]:
        """Take a sequence out, with its prompt cache.

        Args:
            sequence (Sequence): One that is in the pass under way.
            num_tokens (int): How many tokens the cache is to hold. It may be told to
                leave out what was emitted in the last turn.
        """
        starting = [] if self._latest is None else self._latest.starting
        for start in [*self.starting, *starting]:
            if start.sequence is sequence and sequence not in self._riding:
                start.session.close(num_tokens, start.states)
                sequence.leave_index(start.cache, num_tokens)
                return start.cache
        index = self._riding.index(sequence)
        cache = self._caches.extract(index, num_tokens)
        session = self._session.release(index)
        session.close(num_tokens, self._state_of(sequence, num_tokens))
        self.remove([sequence])
        sequence.leave_index(cache, num_tokens)
        return [*cache, *session.entries]

    def copy_cache(self, sequence: Sequence) -> list[Any]:
        """Entries of a sequence that stays, which hold all tokens that it emitted."""
        index = self._riding.index(sequence)
        cache = self._caches.copy(index, sequence.num_cached + 1)
        sequence.copy_index(cache, sequence.num_cached + 1)
        return cache

    def _collect(self, turn: Turn) -> None:
        """Wait for the tokens of a turn, unless that has been done, and count them."""
        if turn.is_collected:
            return
        turn.collect(self.sequences)
        seconds, is_undisturbed = self._timer.lap()
        for emission in turn.emissions:
            stats = emission.sequence.options.stats
            stats.add_round(emission.num_drafted, emission.source)
        current = turn.current
        if seconds is None or current is None:
            return
        depths = {emission.num_drafted for emission in turn.emissions}
        is_typical = any(current.plan.num_copied) or (
            len(depths) == 1
            and (depths != {0} or (current.is_early and self._ahead is not None))
        )
        self._planner.observe(
            current.plan,
            current.num_accepted,
            seconds,
            is_typical and is_undisturbed and not current.does_more,
        )

    def _accept(self, turn: Turn) -> Committed:
        """What each sequence emits, of which only the numbers have to be known."""
        committed = turn.committed(self.sequences)
        for index, sequence in enumerate(turn.sequences):
            if number := committed.num_rows[index]:
                sequence.num_accepted += number
                if sequence.verifier.processors:
                    sequence.remember(committed.of(index)[0])
        return committed

    def _roll_back(self, committed: Committed) -> None:
        """Undo the rows of each sequence behind those of the tokens it emits."""
        num_rows = committed.num_rows[: len(self._riding)]
        if self._riding:
            self._caches.keep(num_rows)
        for sequence, number in zip(self._riding, num_rows, strict=True):
            sequence.num_cached_before = sequence.num_cached
            sequence.num_cached += number

    def _choose(self, turn: Turn, committed: Committed) -> Plan:
        """How many tokens to draft for each sequence, and by what.

        A drafter that put tokens off first catches up, in a pass without drafts. So no
        number of draft tokens is ever billed for that.
        """
        self._catches_up = self._keeps_up = False
        nothing = [0] * len(self._riding)
        if committed.states is None and self._drafter.reads_hidden_states:
            return Plan(nothing, nothing)
        wanted = self._num_draft_tokens_wanted or self._planner.choose()
        plan = self._plan(wanted)
        if not turn.is_collected and any([*plan.num_drafted, *plan.num_copied]):
            self._collect(turn)
            plan = self._plan(wanted)
        drafting = [index for index, number in enumerate(plan.num_drafted) if number]
        self._catches_up = self._session.is_behind(drafting)
        self._num_draft_tokens_wanted = wanted if self._catches_up else 0
        if self._catches_up:
            return Plan(nothing, nothing)
        everyone = range(len(self._riding))
        self._keeps_up = any(plan.num_copied) and not self._session.is_behind(everyone)
        return plan

    def _plan(self, wanted: int) -> Plan:
        def limit(wanted: int) -> list[int]:
            return [
                int(sequence.num_to_draft(wanted, self._caches.max_rows(index)))
                for index, sequence in enumerate(self._riding)
            ]

        chances = [sequence.chances(WIDTHS[-1]) for sequence in self._riding]
        return self._planner.plan(wanted, limit, chances)

    def _draft(self, committed: Committed, plan: Plan) -> BatchProposals:
        """Show the drafter what was emitted, and let it propose what may follow."""
        proposals = BatchProposals(self._riding, self._vocab_size, self._drafter.name)
        self._session.draft(committed, plan.num_drafted, proposals)
        proposals.settle(plan)
        if self._catches_up or self._keeps_up:
            self._session.catch_up()
        return proposals

    def _verify(
        self, turn: Turn, committed: Committed, proposals: BatchProposals
    ) -> None:
        """Start the pass over the last token of each sequence and its draft tokens."""
        tokens, num_draft_tokens = committed.last, proposals.num_drafts
        if any(num_draft_tokens):
            tokens = mx.concatenate([tokens, proposals.matrix()], axis=1)
        # What is drafted can be computed while the pass is built.
        mx.async_eval(tokens)
        output = self._caches.run(tokens, [1 + number for number in num_draft_tokens])
        does_more = self._catches_up or self._has_changed
        self._ahead = Pass(
            self._riding, proposals, output, not turn.is_collected, does_more
        )
        self._ahead.dispatch()

    def _admit(self, turn: Turn, committed: Committed) -> Committed:
        """Let sequences leave that have ended, and others join."""
        live = [
            index
            for index, sequence in enumerate(turn.sequences)
            if sequence in self.sequences and not sequence.has_failed
        ]
        staying = [i for i in live if i < len(self._riding)]
        starting = [turn.starting[i - len(self._riding)] for i in live[len(staying) :]]
        self._has_changed = len(starting) > 0 or len(staying) < len(self._riding)
        if not self._has_changed:
            return committed
        if len(staying) < len(self._riding):
            self._caches.filter(staying)
            self._session.filter(staying)
            self._riding = [self._riding[index] for index in staying]
        self._use_caches_for(len(live))
        for start in starting:
            self._join(start)
        self._planner.meet(
            round_times(self._model, self._drafter, len(live)),
            copy_times(self._model, self._drafter, len(live)),
        )
        return committed.filtered(live)

    def _join(self, start: Start) -> None:
        try:
            self._caches.join(start.cache)
        except SpeculationError as error:
            self._separate_for_good(error)
            self._caches.join(start.cache)
        self._session.join(start.session)
        self._riding = [*self._riding, start.sequence]
        if start.logprobs is not None:
            self._vocab_size = start.logprobs.shape[-1]

    def _use_caches_for(self, num_sequences: int) -> None:
        """Have one pass for several sequences, and stock entries for one."""
        is_joint = isinstance(self._caches, JointCaches)
        if num_sequences == 1 and is_joint:
            self._move(self._separate_caches(), SeparateSessions())
        elif num_sequences > 1 and not is_joint and not self._must_be_separate:
            try:
                if (session := self._drafter.open_batch()) is None:
                    return
                caches = JointCaches(self._model, self._drafter.reads_hidden_states)
                self._move(caches, session)
            except SpeculationError as error:
                self._separate_for_good(error)

    def _move(self, caches: Caches, session: BatchDraftSession) -> None:
        """Go on with other caches, which each sequence is copied to."""
        for index, sequence in enumerate(self._riding):
            caches.join(self._caches.extract(index, sequence.num_cached))
        for index in range(len(self._riding)):
            session.join(self._session.release(index))
        self._caches, self._session = caches, session

    def _separate_for_good(self, reason: SpeculationError) -> None:
        logging.warning("Sequences are decoded one after the other: %s", reason)
        self._must_be_separate = True
        if isinstance(self._caches, JointCaches):
            self._move(self._separate_caches(), SeparateSessions())

    def _separate_caches(self) -> SeparateCaches:
        return SeparateCaches(
            self._model, self._drafter.reads_hidden_states, self._options
        )

    def _state_of(self, sequence: Sequence, num_tokens: int) -> mx.array | None:
        """The target's state of the last of the tokens, ``[1, 1, hidden]``."""
        row, passed = num_tokens - sequence.num_cached - 1, self._ahead
        if row < 0 or passed is None:
            row = num_tokens - sequence.num_cached_before - 1
            passed = None if self._latest is None else self._latest.current
        if passed is not None and sequence in passed.sequences:
            index, states = passed.sequences.index(sequence), passed.output.states
            if states is None or row < 0:
                return None
            return states[index : index + 1, row : row + 1]
        starting = [] if self._latest is None else self._latest.starting
        return next((x.states for x in starting if x.sequence is sequence), None)


@dataclass
class Emission:
    """What a sequence emits in a turn.

    Args:
        sequence (Sequence): The sequence.
        tokens (list[int]): What it emits.
        logprobs (list[mx.array]): What each was drawn from, ``[vocab]``.
        num_drafted (int): How many tokens were drafted.
        num_accepted (int): How many of these it emits.
        source (str, optional): What drafted them.
        error (Exception, optional): What a sampler or a logits processor raised
            instead of going on.
    """

    sequence: Sequence
    tokens: list[int]
    logprobs: list[mx.array]
    num_drafted: int = 0
    num_accepted: int = 0
    source: str | None = None
    error: Exception | None = None

    def count(self, position: int) -> None:
        """Count one of the tokens, before whoever asked for it can see it."""
        stats = self.sequence.options.stats
        stats.add_token(position if position < self.num_accepted else None, self.source)


class Turn:
    """What one turn of the loop emits.

    Args:
        current (Pass, optional): The pass that was under way.
        starting (list[Start]): Sequences that emit their first token.
    """

    def __init__(self, current: Pass | None, starting: list[Start]):
        self.current = current
        self.starting = starting
        self.is_collected = False
        self.emissions: list[Emission] = []

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, also those that have ended."""
        riding = [] if self.current is None else self.current.sequences
        return [*riding, *(start.sequence for start in self.starting)]

    @property
    def is_certain(self) -> bool:
        """Whether each sequence emits one token, whichever that is."""
        errors = any(start.error for start in self.starting)
        return not errors and (self.current is None or self.current.is_certain)

    def collect(self, live: list[Sequence]) -> None:
        """Wait for the tokens; those of sequences that ended before are left out."""
        found: list[Emission] = []
        if (current := self.current) is not None:
            current.collect()
            found += [
                Emission(
                    sequence,
                    current.emitted[index],
                    current.logprobs[index],
                    current.num_drafted[index],
                    current.num_accepted[index],
                    current.sources[index],
                    current.errors.get(index),
                )
                for index, sequence in enumerate(current.sequences)
            ]
        for start in self.starting:
            tokens = [] if start.error else [int(start.token.item())]
            found.append(
                Emission(start.sequence, tokens, start.all_logprobs, error=start.error)
            )
        self.emissions = [each for each in found if each.sequence in live]
        for emission in self.emissions:
            emission.tokens = emission.sequence.emit(emission.tokens)
            emission.sequence.has_failed = emission.error is not None
        self.is_collected = True

    def committed(self, live: list[Sequence]) -> Committed:
        """What the sequences emit, also before the tokens are known."""
        parts = [] if self.current is None else [self.current.committed()]
        committed = together([*parts, *(start.committed for start in self.starting)])
        numbers = {id(each.sequence): len(each.tokens) for each in self.emissions}
        committed.num_rows = [
            (
                (numbers.get(id(sequence), 0) if self.is_collected else 1)
                if sequence in live
                else 0
            )
            for sequence in self.sequences
        ]
        return committed
