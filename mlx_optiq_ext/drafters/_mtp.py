"""Drafting with the multi-token-prediction head of a Qwen3.5, 3.6 or 3.8 model.

The head reads pairs (state of token p, embedding of token p + 1) and predicts token
p + 2. Invariant between generations: with N tokens in the target's cache, the head's KV
cache holds the pairs of the first N - 1 tokens, and the state of the last one waits in
an ``ArraysCache`` beside it for the token that will follow. The number N is kept there
too: when it is not that of the target, somebody has decoded without the head, and it
starts afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from .._errors import SpeculationError
from .._options import DraftVocab
from ..mixins import MTPMixin
from ..rollback import Batch
from ._batched import Committed, Proposals
from ._draft_vocab import DraftVocabulary
from ._protocol import Proposal

STATE, NUM_TOKENS = 0, 1  # slots of the ArraysCache
MAX_PUT_OFF = 64  # tokens that the head is shown together, while nothing is drafted


class MTPDrafter:
    """Drafts with a model's own MTP head.

    Args:
        model (MTPMixin): A model with its head attached.
        draft_vocab (int or path, optional): Propose only so many tokens, or those whose
          ids a file has, one a line or as a JSON list. Default: any token.

    Raises:
        SpeculationError: If only some tokens are wanted and that cannot be.
    """

    name = "mtp"
    reads_hidden_states = True
    computes_drafts = True

    def __init__(self, model: MTPMixin, draft_vocab: DraftVocab | None = None):
        self._model = model
        self._vocabulary = (
            None if draft_vocab is None else DraftVocabulary.of(model, draft_vocab)
        )

    def limited(self, draft_vocab: DraftVocab) -> MTPDrafter:
        """The same drafter, proposing only some of the tokens.

        Args:
            draft_vocab (int or path): Which.
        """
        return MTPDrafter(self._model, draft_vocab)

    def make_cache(self) -> list[Any]:
        return self._model.make_mtp_cache()

    def open_batch(self) -> MTPBatchSession:
        return MTPBatchSession(self._model, self._vocabulary)

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> MTPSession:
        own = prompt_cache[num_target_entries:]
        if not _is_usable(own, num_tokens):
            own = self.make_cache()
            prompt_cache[num_target_entries:] = own
        kv_cache, arrays = own
        return MTPSession(
            self._model, kv_cache, arrays, num_tokens, self._vocabulary, tokens
        )


class MTPSession:
    """The head at work on one sequence.

    ``_put_off`` are tokens that nothing was to be drafted after, with their states: the
    head is shown them all at once when it is needed.
    """

    def __init__(
        self,
        model: MTPMixin,
        kv_cache: KVCache,
        arrays: ArraysCache,
        num_tokens: int,
        vocabulary: DraftVocabulary | None = None,
        tokens: Sequence[int] = (),
    ):
        self._model = model
        self._vocabulary = vocabulary
        self._seen = [mx.array(tokens)] if tokens else []
        self._kv_cache = kv_cache
        self._arrays = arrays
        # Tokens before the head's first pair: a cache filled without the head.
        is_fresh = arrays[STATE] is None
        self._num_unseen = num_tokens - (0 if is_fresh else kv_cache.offset + 1)
        self._put_off: list[tuple[mx.array, mx.array]] = []

    @property
    def entries(self) -> list[Any]:
        return [self._kv_cache, self._arrays]

    @property
    def num_put_off(self) -> int:
        return len(self._put_off)

    @property
    def last_state(self) -> mx.array | None:
        return self._arrays[STATE]

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        assert states is not None
        self._seen.append(tokens)
        if embeddings is None:
            embeddings = self._model.embed(tokens)
        show(self._model, self._kv_cache, self._arrays, embeddings[None], states)

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        if states is None:
            return
        if num_draft_tokens == 0:
            self._put_off.append((tokens, states))
            if len(self._put_off) == MAX_PUT_OFF:
                self.catch_up()
            return
        self.catch_up()
        hidden = self._see(self._model.embed(tokens)[None], states)[:, -1:]
        for position in range(num_draft_tokens):
            if position:
                embeddings = self._model.embed(proposal.tokens[-1])[None]
                hidden = self._see(embeddings, hidden)
            proposal.add(self._project(hidden)[:, -1])
        self._kv_cache.trim(num_draft_tokens - 1)

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        self.catch_up()
        num_pairs = max(num_tokens - 1 - self._num_unseen, 0)
        self._kv_cache.trim(max(self._kv_cache.offset - num_pairs, 0))
        if last_state is not None:
            self._arrays[STATE] = last_state
        if self._arrays[STATE] is not None:
            self._arrays[NUM_TOKENS] = mx.array([[num_tokens]])

    def catch_up(self) -> None:
        if not self._put_off:
            return
        tokens, states = zip(*self._put_off, strict=True)
        self._put_off.clear()
        embeddings = self._model.embed(mx.concatenate(tokens))[None]
        # Only keys and values of the head are ever computed here.
        self._see(embeddings, mx.concatenate(states, axis=1))
        mx.async_eval(self._kv_cache.state)

    @cached_property
    def _project(self) -> Callable[[mx.array], mx.array]:
        if self._vocabulary is None:
            return self._model.project
        return self._vocabulary.projection(mx.concatenate(self._seen).tolist())

    def _see(self, embeddings: mx.array, states: mx.array) -> mx.array:
        return self._model.mtp(embeddings, states, cache=self._kv_cache)


class MTPBatchSession:
    """The head at work on several sequences: one run for all of them.

    Their keys and values are together. What else a session has stays with it.
    """

    def __init__(self, model: MTPMixin, vocabulary: DraftVocabulary | None):
        self._model = model
        self._vocabulary = vocabulary
        self._head = Batch()
        self._sessions: list[MTPSession] = []
        self._put_off: list[Committed] = []
        self._project: Callable[[mx.array], mx.array] | None = None

    def is_behind(self, indices: Sequence[int]) -> bool:
        return len(self._put_off) > 0

    @property
    def entries(self) -> list[Any]:
        return [*self._head.entries, *(session._arrays for session in self._sessions)]

    def join(self, session: MTPSession) -> None:
        session.catch_up()
        self.catch_up()
        self._head.join([session._kv_cache])
        self._sessions.append(session)
        self._project = None

    def release(self, index: int) -> MTPSession:
        self.catch_up()
        session = self._sessions[index]
        (session._kv_cache,) = self._head.extract(index)
        return session

    def filter(self, indices: Sequence[int]) -> None:
        self.catch_up()
        self._head.filter(indices)
        self._sessions = [self._sessions[index] for index in indices]
        self._project = None

    def draft(
        self, committed: Committed, num_draft_tokens: list[int], proposals: Proposals
    ) -> None:
        if not any(num_draft_tokens):
            self._put_off.append(committed)
            if len(self._put_off) == MAX_PUT_OFF:
                self.catch_up()
            return
        self.catch_up()
        project = self._projection()
        rows = self._see(committed)
        last = mx.array([[[max(number - 1, 0)]] for number in committed.num_rows])
        hidden = mx.take_along_axis(rows, last, axis=1)
        depth = max(num_draft_tokens)
        for position in range(depth):
            if position:
                hidden = self._run(self._model.embed(proposals.latest), hidden)
            proposals.add(project(hidden)[:, -1])
        if depth > 1:
            self._head.take_back(depth - 1)

    def catch_up(self) -> None:
        if not self._put_off:
            return
        put_off, self._put_off = self._put_off, []
        for committed in put_off:
            self._see(committed)
        mx.async_eval([entry.state for entry in self._head.entries])

    def _see(self, committed: Committed) -> mx.array:
        """Show the head what was committed; its states of all rows."""
        assert committed.states is not None
        states = self._run(self._model.embed(committed.tokens), committed.states)
        self._head.keep(committed.num_rows)
        return states

    def _run(self, embeddings: mx.array, states: mx.array) -> mx.array:
        return self._head.run(
            lambda entries, _: self._model.mtp(embeddings, states, cache=entries[0]),
            states.shape[1],
        )

    def _projection(self) -> Callable[[mx.array], mx.array]:
        if self._vocabulary is None:
            return self._model.project
        if self._project is None:
            seen = (tokens for session in self._sessions for tokens in session._seen)
            everything = [token for tokens in seen for token in tokens.tolist()]
            self._project = self._vocabulary.projection(everything)
        return self._project


def show(
    model: MTPMixin,
    kv_cache: KVCache,
    arrays: ArraysCache,
    embeddings: mx.array,
    states: mx.array,
) -> None:
    """Show the head of a model tokens that the target has processed.

    Args:
        model (MTPMixin): With its head.
        kv_cache (KVCache): The head's.
        arrays (ArraysCache): With the state before the first of the tokens, or none.
        embeddings (mx.array): Of the tokens, ``[1, num_tokens, hidden]``.
        states (mx.array): What the target made of them, of the same shape.
    """
    before = states[:, :-1]
    if arrays[STATE] is not None:
        before = mx.concatenate([arrays[STATE], before], axis=1)
    if num_pairs := before.shape[1]:
        model.mtp(embeddings[:, -num_pairs:], before, cache=kv_cache)
    arrays[STATE] = states[:, -1:]


def _is_usable(entries: list[Any], num_tokens: int) -> bool:
    """Whether entries behind the target's are the head's and up to date."""
    if not entries:
        return False
    if [type(entry) for entry in entries] not in (
        [KVCache, ArraysCache],
        [QuantizedKVCache, ArraysCache],
    ):
        found = ", ".join(type(entry).__name__ for entry in entries)
        raise SpeculationError(
            "Cannot speculate with the MTP head: behind the model's own entries the "
            f"prompt cache has {found}, not the KVCache and ArraysCache of an MTP head."
        )
    num_seen = entries[1][NUM_TOKENS]
    return num_seen is not None and num_seen.item() == num_tokens
