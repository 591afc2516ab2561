"""The rounds of one generation, and what may still have to be undone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator

import mlx.core as mx
from mlx_lm.generate import DEFAULT_PREFILL_STEP_SIZE

from ..drafters import Drafter
from ._depth import Depth
from ._round import Round
from ._rows import Proposal, Verifier
from ._statistics import SpeculationStats
from ._target import Target

CLEAR_CACHE_INTERVAL = 256  # tokens, as in mlx-lm's generate_step

Token = tuple[int, mx.array, bool]
ProgressCallback = Callable[[int, int], None]


class Decoder:
    """One generation.

    Args:
        target (Target): The target with its cache.
        drafter (Drafter): What proposes tokens.
        verifier (Verifier): How tokens are drawn.
        depth (Depth): Decides how many tokens to draft in a round.
        max_tokens (int): Tokens to emit; no limit if negative.
        stats (SpeculationStats): Counts what happens.
        history (mx.array, optional): Tokens before the prompt that logits processors
          are to be shown, ``[num_tokens]``.

    ``_current`` is the round whose tokens are being yielded, ``_num_yielded`` how many
    of them were, ``_ahead`` the round that is already under way, and ``_num_tokens``
    how many tokens the target's cache held before the current round. ``_num_remaining``
    and ``_num_launched`` count tokens to the end of the round that is ahead.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        depth: Depth,
        max_tokens: int,
        stats: SpeculationStats,
        history: mx.array | None = None,
    ):
        self._target = target
        self._num_tokens = target.num_tokens
        self._session = drafter.open(target.cache, target.num_entries, self._num_tokens)
        self._verifier = verifier
        self._depth = depth
        self._num_remaining = math.inf if max_tokens < 0 else max_tokens
        self._stats = stats
        self._history = history
        self._current: Round | None = None
        self._ahead: Round | None = None
        self._num_yielded = self._num_launched = 0
        self._last_collected: float | None = None

    def rounds(
        self,
        prompt: mx.array,
        embeddings: mx.array | None = None,
        step_size: int = DEFAULT_PREFILL_STEP_SIZE,
        callback: ProgressCallback = lambda *_: None,
    ) -> Generator[Round, None, None]:
        """Process a prompt, then yield rounds, each with the next one under way.

        Whoever consumes them takes the tokens with ``emit``. When this generator ends
        or is closed, the cache holds the prompt and the tokens taken.
        """
        num_prompt_tokens = len(prompt if embeddings is None else embeddings)
        try:
            self._remember(prompt)
            callback(0, num_prompt_tokens)
            for num_processed in self._prefill(prompt, embeddings, step_size):
                callback(num_processed, num_prompt_tokens)
            rest = slice(num_prompt_tokens - 1, None)
            first = self._first_round(
                prompt[rest], None if embeddings is None else embeddings[rest]
            )
            if not self._num_remaining:
                first.collect()
                callback(num_prompt_tokens, num_prompt_tokens)
                return
            for current in self._rounds(first):
                if current is first:
                    callback(num_prompt_tokens, num_prompt_tokens)
                yield current
        finally:
            self._settle()

    def resume(
        self, token: mx.array, logprobs: mx.array
    ) -> Generator[Round, None, None]:
        """Yield rounds, of which the first is a token that was drawn elsewhere.

        Args:
            token (mx.array): The one after those in the cache, ``[1]``.
            logprobs (mx.array): What it was drawn from, ``[vocab]``.
        """
        try:
            first = Round(self._target, self._verifier, Proposal(self._verifier, None))
            first.adopt(token, logprobs, self._session.last_state)
            self._current = first
            self._num_tokens -= 1
            yield from self._rounds(first)
        finally:
            self._settle()

    def emit(self, current: Round) -> Iterator[Token]:
        """The tokens of a round, counted as they are taken."""
        for position, token in enumerate(current.emitted):
            is_draft = position < current.num_accepted
            self._stats.add_token(position if is_draft else None)
            self._num_yielded += 1
            yield token, current.logprobs[position], is_draft
            if self._stats.num_tokens % CLEAR_CACHE_INTERVAL == 1:
                mx.clear_cache()

    def untake(self) -> None:
        """Leave the last token taken out of the cache that this ends with."""
        self._num_yielded -= 1

    def _remember(self, tokens: mx.array) -> None:
        """Extend the history that logits processors are shown."""
        if not self._verifier.processors or len(tokens) == 0:
            return
        history = [] if self._history is None else [self._history]
        self._history = mx.concatenate([*history, tokens])

    def _prefill(
        self, prompt: mx.array, embeddings: mx.array | None, step_size: int
    ) -> Iterator[int]:
        """Process all but the last token, in the chunks of ``generate_step``."""
        num_tokens = len(prompt if embeddings is None else embeddings) - 1
        for start in range(0, num_tokens, step_size):
            chunk = slice(start, min(start + step_size, num_tokens))
            rows = None if embeddings is None else embeddings[chunk]
            states = self._target.forward(prompt[chunk], rows)
            self._session.prefill(prompt[chunk], states, rows)
            self._target.quantize()
            mx.eval([entry.state for entry in self._target.cache])
            self._num_tokens += chunk.stop - chunk.start
            yield chunk.stop
            mx.clear_cache()

    def _first_round(self, prompt: mx.array, embeddings: mx.array | None) -> Round:
        proposal = Proposal(self._verifier, self._history, 0)
        first = Round(self._target, self._verifier, proposal)
        states = first.run(prompt, embeddings)
        self._current = first
        self._session.prefill(prompt, states, embeddings)
        first.dispatch(is_read=self._num_remaining > 0)
        return first

    def _rounds(self, current: Round) -> Iterator[Round]:
        while True:
            num_drafts = self._advance(current) if current.is_certain else None
            # Without drafts the next round need not wait for the token, as in plain
            # decoding.
            following = self._launch(current, 0) if num_drafts == 0 else None
            self._collect(current, is_next_early=following is not None)
            self._stats.add_round(current.num_drafted)
            if following is None and current.error is None:
                if num_drafts is None:
                    num_drafts = self._advance(current)
                following = self._launch(current, num_drafts)
            yield current
            if current.error is not None:
                raise current.error
            if not self._num_remaining or following is None:
                return
            self._num_tokens += len(current.emitted)
            self._current, self._ahead, self._num_yielded = following, None, 0
            current = following

    def _collect(self, current: Round, is_next_early: bool) -> None:
        current.collect()
        now = time.perf_counter()
        if self._last_collected is not None:
            self._depth.observe(
                current.num_drafted,
                current.num_accepted,
                now - self._last_collected,
                # A parked round takes as long as others if it was launched before it
                # was waited for, and its successor while it was.
                is_typical=current.num_drafted > 0
                or (current.is_early and is_next_early),
            )
        self._last_collected = now

    def _advance(self, current: Round) -> int:
        """Keep what a round emits, and say how many tokens to draft after it."""
        tokens = current.tokens
        self._num_remaining -= tokens.size
        self._num_launched += tokens.size
        current.transaction.keep(tokens.size)
        self._target.quantize()
        self._remember(tokens)
        # Nothing is drafted after a token whose state is not known.
        if current.states is None:
            return 0
        if not (depth := self._depth.choose()):
            return 0
        # The round also emits one token of the target's own.
        num_rows = min(self._num_remaining, self._target.max_rows)
        return int(max(min(depth, num_rows - 1), 0))

    def _launch(self, current: Round, num_drafts: int) -> Round:
        """Start the next round from what the current one emits."""
        tokens = current.tokens
        proposal = Proposal(self._verifier, self._history, self._num_launched)
        self._session.draft(
            tokens, current.states_of(tokens.size), num_drafts, proposal
        )
        mx.async_eval(proposal.tokens)
        following = Round(
            self._target, self._verifier, proposal, is_early=not current.is_collected
        )
        self._ahead = following
        following.run(mx.concatenate([tokens[-1:], *proposal.tokens]))
        following.dispatch(is_read=self._num_remaining > 0)
        return following

    def _settle(self) -> None:
        """Bring every cache to hold the prompt and the tokens yielded, no more."""
        num_tokens, last_state = self._num_tokens, None
        if (current := self._current) is not None:
            num_tokens += 1 + self._num_yielded
            last_state = self._settle_rounds(current, self._num_yielded)
        self._target.quantize()
        self._session.close(num_tokens, last_state)
        mx.async_eval([entry.state for entry in self._target.cache])

    def _settle_rounds(self, current: Round, num_yielded: int) -> mx.array | None:
        """Undo the rows behind the last token yielded and return its state."""
        if self._ahead is not None:
            if num_yielded == current.tokens.size:
                self._ahead.transaction.keep(1)
                return self._ahead.states_of(1)
            self._ahead.transaction.keep(0)
        current.transaction.keep(1 + num_yielded)
        states = current.states_of(1 + num_yielded)
        return None if states is None else states[:, -1:]
