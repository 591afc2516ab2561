"""The rounds of one generation, and what may still have to be undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx_lm.generate import DEFAULT_PREFILL_STEP_SIZE

from ..drafters import Drafter
from ._depth import Depth
from ._round import Round
from ._rows import Proposal, Verifier
from ._statistics import SpeculationStats
from ._target import Target
from ._timer import RoundTimer

CLEAR_CACHE_INTERVAL = 256  # tokens, as in mlx-lm's generate_step

Token = tuple[int, mx.array, bool]
ProgressCallback = Callable[[int, int], None]

# The generation that is under way with a prompt cache, by the first entry of that.
_owners: WeakKeyDictionary[Any, Decoder] = WeakKeyDictionary()


class Decoder:
    """One generation.

    Args:
        target (Target): The target with its cache.
        drafter (Drafter): What proposes tokens.
        verifier (Verifier): How tokens are drawn.
        depth (Depth): Decides how many tokens to draft in a round.
        max_tokens (int): Tokens to emit; no limit if negative.
        stats (SpeculationStats): Counts what happens.
        tokens (Sequence[int]): Those that the cache holds already, as far as they are
            known.

    ``_current`` is the round whose tokens are being yielded, ``_num_yielded`` how many
    of them were, ``_ahead`` the round that is already under way, and ``_num_tokens``
    how many tokens the target's cache held before the current round. ``_num_remaining``
    and ``_num_accepted`` count tokens to the end of the round that is ahead.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        depth: Depth,
        max_tokens: int,
        stats: SpeculationStats,
        tokens: Sequence[int] = (),
    ):
        _take_over(self, target)
        self._target = target
        self._drafter = drafter
        self._num_tokens = target.num_tokens
        self._session = drafter.open(
            target.cache, target.num_entries, self._num_tokens, tokens
        )
        self._verifier = verifier
        self._depth = depth
        self._num_remaining = math.inf if max_tokens < 0 else max_tokens
        self._stats = stats
        self._history: mx.array | None = None
        self._remember(mx.array(tokens))
        self._current: Round | None = None
        self._ahead: Round | None = None
        self._num_yielded = self._num_accepted = 0
        self._num_draft_tokens_wanted = 0
        self._timer = RoundTimer()
        self._is_settled = False

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
            self.settle()

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
            self.settle()

    def emit(self, current: Round) -> Iterator[Token]:
        """The tokens of a round, counted as they are taken."""
        for position, token in enumerate(current.emitted):
            is_draft = position < current.num_accepted
            self._stats.add_token(position if is_draft else None, self._drafter.name)
            self._num_yielded += 1
            yield token, current.logprobs[position], is_draft
            if self._stats.num_tokens % CLEAR_CACHE_INTERVAL == 1:
                mx.clear_cache()

    def untake(self) -> None:
        """Leave the last token taken out of the cache that this ends with."""
        self._num_yielded -= 1

    def settle(self) -> None:
        """End, with every cache holding the prompt and the tokens yielded, no more."""
        if self._is_settled:
            return
        self._is_settled = True
        num_tokens, last_state = self._num_tokens, None
        if (current := self._current) is not None:
            num_tokens += 1 + self._num_yielded
            last_state = self._undo(current, self._num_yielded)
        self._target.quantize()
        self._session.close(num_tokens, last_state)
        mx.async_eval([entry.state for entry in self._target.cache])

    def _rounds(self, current: Round) -> Generator[Round, None, None]:
        """The loop: each turn begins with one round under way and ends with the next.

        A round without drafts emits one token. What follows from that is started before
        the token is known, as in plain decoding, unless something is to be drafted.
        """
        while True:
            if not current.is_certain:
                self._collect(current)
            if current.error is None:
                tokens = self._accept(current)
                self._roll_back(current, tokens)
                num_draft_tokens = self._choose(current)
                if num_draft_tokens:
                    self._collect(current)
                proposal = self._draft(current, tokens, num_draft_tokens)
                self._ahead = self._verify(current, tokens, proposal)
                self._collect(current)
            self._timer.pause()
            yield current
            self._timer.resume()
            if self._is_settled:
                raise RuntimeError("The prompt cache was given to another generation.")
            if current.error is not None:
                raise current.error
            if not self._num_remaining or self._ahead is None:
                return
            self._num_tokens += len(current.emitted)
            current, self._ahead, self._num_yielded = self._ahead, None, 0
            self._current = current

    def _accept(self, current: Round) -> mx.array:
        """The tokens that a round emits, of which only their number has to be known."""
        tokens = current.tokens
        self._num_remaining -= tokens.size
        self._num_accepted += tokens.size
        self._remember(tokens)
        return tokens

    def _roll_back(self, current: Round, tokens: mx.array) -> None:
        """Undo the rows of a round that are behind those of the tokens it emits."""
        current.transaction.keep(tokens.size)
        self._target.quantize()

    def _draft(
        self, current: Round, tokens: mx.array, num_draft_tokens: int
    ) -> Proposal:
        """Show the drafter the tokens that were emitted, and let it propose others."""
        proposal = Proposal(
            self._verifier, self._history, self._num_accepted, current.vocab_size
        )
        states = current.states_of(tokens.size)
        self._session.draft(tokens, states, num_draft_tokens, proposal)
        if self._num_draft_tokens_wanted:
            self._session.catch_up()
        mx.async_eval(proposal.tokens)
        return proposal

    def _verify(self, current: Round, tokens: mx.array, proposal: Proposal) -> Round:
        """Start the pass of the target over the last token and the draft tokens."""
        following = Round(
            self._target,
            self._verifier,
            proposal,
            is_early=not current.is_collected,
            does_more=self._num_draft_tokens_wanted > 0,
        )
        # What follows may fail, and then has to be undone.
        self._ahead = following
        following.run(mx.concatenate([tokens[-1:], *proposal.tokens]))
        following.dispatch(is_read=self._num_remaining > 0)
        return following

    def _choose(self, current: Round) -> int:
        """How many tokens to draft after a round.

        A drafter that put tokens off first catches up, in a round without drafts. So no
        number of draft tokens is ever billed for that.
        """
        if current.states is None and self._drafter.reads_hidden_states:
            return 0
        wanted = self._num_draft_tokens_wanted or self._depth.choose()
        # The round also emits one token of the target's own.
        num_rows = min(self._num_remaining, self._target.max_rows)
        chosen = int(max(min(wanted, num_rows - 1), 0))
        is_behind = chosen > 0 and self._session.num_put_off > 0
        self._num_draft_tokens_wanted = wanted if is_behind else 0
        return 0 if is_behind else chosen

    def _collect(self, current: Round) -> None:
        """Wait for a round, unless that has been done, and measure it."""
        if current.is_collected:
            return
        current.collect()
        seconds, is_undisturbed = self._timer.lap()
        self._stats.add_round(current.num_drafted)
        if seconds is not None:
            # A round without drafts takes as long as others if it was started before
            # the last one was waited for, and the next one before it was itself.
            is_typical = current.num_drafted > 0 or (
                current.is_early and self._ahead is not None
            )
            self._depth.observe(
                current.num_drafted,
                current.num_accepted,
                seconds,
                is_typical and is_undisturbed and not current.does_more,
            )

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
            output = self._target.forward(prompt[chunk], rows)
            self._session.prefill(prompt[chunk], output.states, rows)
            self._target.quantize()
            mx.eval([entry.state for entry in self._target.cache])
            self._num_tokens += chunk.stop - chunk.start
            yield chunk.stop
            mx.clear_cache()

    def _first_round(self, prompt: mx.array, embeddings: mx.array | None) -> Round:
        proposal = Proposal(self._verifier, self._history, 0)
        first = Round(self._target, self._verifier, proposal)
        first.run(prompt, embeddings)
        self._current = first
        self._session.prefill(prompt, first.states, embeddings)
        first.dispatch(is_read=self._num_remaining > 0)
        return first

    def _undo(self, current: Round, num_yielded: int) -> mx.array | None:
        """Undo the rows behind the last token yielded and return its state."""
        if self._ahead is not None:
            if num_yielded == current.tokens.size:
                self._ahead.transaction.keep(1)
                return self._ahead.states_of(1)
            self._ahead.transaction.keep(0)
        current.transaction.keep(1 + num_yielded)
        states = current.states_of(1 + num_yielded)
        return None if states is None else states[:, -1:]


def _take_over(decoder: Decoder, target: Target) -> None:
    """End a generation that was left where it is and has the same cache.

    Otherwise the garbage collector would end it, when another one may be under way.
    """
    if not target.cache:
        return
    first = target.cache[0]
    if (owner := _owners.get(first)) is not None:
        owner.settle()
    _owners[first] = decoder
