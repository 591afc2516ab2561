"""The speculative decode loop.

A round drafts tokens, verifies them with the target in one forward pass, emits those
that are accepted and one token of the target's own, and rolls back the rest. The next
round is under way before the tokens of this one are yielded; a round blocks once.

Words, after vLLM: the token in place of the first rejected draft token is *recovered*;
the one after a draft that is accepted whole is the *bonus* token.

Invariant: at every yield the target's cache can be brought to hold exactly the prompt
and the tokens yielded, and it is when the generator ends, for whatever reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, generation_stream
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.utils import does_model_support_input_embeddings

from .._options import check_num_draft_tokens
from ..drafters import Drafter, as_drafter
from ._round import Round
from ._rows import Proposal, Verifier
from ._statistics import SpeculationStats
from ._target import CacheOptions, Target

CLEAR_CACHE_INTERVAL = 256  # tokens, as in mlx-lm's generate_step

Token = tuple[int, mx.array, bool]
ProgressCallback = Callable[[int, int], None]


def spec_generate_step(
    prompt: mx.array,
    model: nn.Module,
    stream: mx.Stream | mx.ThreadLocalStream = generation_stream,
    *,
    drafter: Drafter | nn.Module | None = None,
    num_draft_tokens: int = 1,
    stats: SpeculationStats | None = None,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    prompt_progress_callback: ProgressCallback | None = None,
    input_embeddings: mx.array | None = None,
) -> Generator[Token, None, None]:
    """Generate tokens as mlx-lm's ``generate_step`` does, several to a forward pass.

    Args:
        prompt (mx.array): The prompt's tokens, shape ``[num_tokens]``.
        model (nn.Module): The target.
        stream: The stream to run on.
        drafter (Drafter or nn.Module, optional): What proposes tokens; a model is used
          as an ordinary draft model. Default: the target's own MTP head.
        num_draft_tokens (int): Tokens to draft in a round, 1 to 8. Default: ``1``.
        stats (SpeculationStats, optional): Counts what happens.

        The other arguments are those of ``generate_step``. The drafter's own entries
        are appended to ``prompt_cache``.

    Yields:
        tuple[int, mx.array, bool]: A token, its log probabilities, shape ``[vocab]``,
          and whether it was drafted.

    Raises:
        ValueError: If an argument is not what it should be.
        SpeculationError: If this model or this cache cannot be decoded speculatively.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """
    check_num_draft_tokens(num_draft_tokens)
    _check_prompt(prompt, model, input_embeddings)
    drafter = as_drafter(drafter, model)
    options = CacheOptions(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    with mx.stream(stream):
        decoder = _Decoder(
            Target(model, drafter.reads_hidden_states, prompt_cache, options),
            drafter,
            Verifier(sampler, logits_processors),
            num_draft_tokens,
            max_tokens,
            SpeculationStats() if stats is None else stats,
        )
        yield from decoder.generate(
            prompt,
            input_embeddings,
            prefill_step_size,
            prompt_progress_callback or (lambda *_: None),
        )


class _Decoder:
    """One generation.

    ``_current`` is the round whose tokens are being yielded, ``_num_yielded`` how many
    of them were, ``_ahead`` the round that is already under way, and ``_num_tokens``
    how many tokens the target's cache held before the current round.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        num_draft_tokens: int,
        max_tokens: int,
        stats: SpeculationStats,
    ):
        self._target = target
        self._num_tokens = target.num_tokens
        self._session = drafter.open(target.cache, target.num_entries, self._num_tokens)
        self._verifier = verifier
        self._num_draft_tokens = num_draft_tokens
        self._num_remaining = math.inf if max_tokens < 0 else max_tokens
        self._stats = stats
        self._history: mx.array | None = None
        self._current: Round | None = None
        self._ahead: Round | None = None
        self._num_yielded = 0

    def generate(
        self,
        prompt: mx.array,
        embeddings: mx.array | None,
        step_size: int,
        callback: ProgressCallback,
    ) -> Generator[Token, None, None]:
        num_prompt_tokens = len(prompt if embeddings is None else embeddings)
        try:
            if self._verifier.processors and len(prompt):
                self._history = prompt
            callback(0, num_prompt_tokens)
            for num_processed in self._prefill(prompt, embeddings, step_size):
                callback(num_processed, num_prompt_tokens)
            rest = slice(num_prompt_tokens - 1, None)
            first = self._first_round(
                prompt[rest], None if embeddings is None else embeddings[rest]
            )
            first.collect()
            callback(num_prompt_tokens, num_prompt_tokens)
            if self._num_remaining:
                for current in self._rounds(first):
                    yield from self._emit(current)
        finally:
            self._settle()

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
        proposal = Proposal(self._verifier, self._history)
        first = Round(self._target, self._verifier, proposal)
        states = first.run(prompt, embeddings)
        self._current = first
        self._session.prefill(prompt, states, embeddings)
        first.dispatch(is_read=self._num_remaining > 0)
        return first

    def _rounds(self, current: Round) -> Iterator[Round]:
        """Rounds whose tokens are to be emitted, each with the next one under way."""
        while True:
            self._stats.add_round(current.num_drafted)
            self._num_remaining -= len(current.emitted)
            if current.error is None:
                following = self._launch(current)
            yield current
            if current.error is not None:
                raise current.error
            if not self._num_remaining:
                return
            self._num_tokens += len(current.emitted)
            self._current, self._ahead, self._num_yielded = following, None, 0
            current = following
            current.collect()

    def _launch(self, current: Round) -> Round:
        """Start the next round from what the current one emitted."""
        num_emitted = len(current.emitted)
        current.transaction.keep(num_emitted)
        self._target.quantize()
        tokens = mx.array(current.emitted, mx.uint32)
        if self._history is not None:
            self._history = mx.concatenate([self._history, tokens])
        elif self._verifier.processors:
            self._history = tokens
        proposal = Proposal(self._verifier, self._history)
        states = current.states[:, :num_emitted]
        self._session.draft(tokens, states, self._num_drafts(), proposal)
        mx.async_eval(proposal.tokens)
        self._ahead = following = Round(self._target, self._verifier, proposal)
        following.run(mx.concatenate([tokens[-1:], *proposal.tokens]))
        following.dispatch(is_read=self._num_remaining > 0)
        return following

    def _num_drafts(self) -> int:
        """Draft tokens of the next round, which also emits one of the target's own."""
        num_rows = min(self._num_remaining, self._target.max_rows)
        return int(max(min(self._num_draft_tokens, num_rows - 1), 0))

    def _emit(self, current: Round) -> Iterator[Token]:
        for position, token in enumerate(current.emitted):
            is_draft = position < current.num_accepted
            self._stats.add_token(position if is_draft else None)
            self._num_yielded += 1
            yield token, current.logprobs[position], is_draft
            if self._stats.num_tokens % CLEAR_CACHE_INTERVAL == 1:
                mx.clear_cache()

    def _settle(self) -> None:
        """Bring every cache to hold the prompt and the tokens yielded, no more."""
        num_tokens, last_state = self._num_tokens, None
        if (current := self._current) is not None:
            num_tokens += 1 + self._num_yielded
            last_state = self._settle_rounds(current, self._num_yielded)
        self._target.quantize()
        self._session.close(num_tokens, last_state)
        mx.async_eval([entry.state for entry in self._target.cache])

    def _settle_rounds(self, current: Round, num_yielded: int) -> mx.array:
        """Undo the rows behind the last token yielded and return its state."""
        if self._ahead is not None:
            if num_yielded == len(current.emitted):
                self._ahead.transaction.keep(1)
                return self._ahead.states[:, :1]
            self._ahead.transaction.keep(0)
        current.transaction.keep(1 + num_yielded)
        return current.states[:, num_yielded : num_yielded + 1]


def _check_prompt(
    prompt: mx.array, model: nn.Module, embeddings: mx.array | None
) -> None:
    if embeddings is None:
        if len(prompt) == 0:
            raise ValueError(
                "Either input_embeddings or prompt (or both) must be provided."
            )
    elif not does_model_support_input_embeddings(model):
        raise ValueError("Model does not support input embeddings.")
    elif len(prompt) not in (0, len(embeddings)):
        raise ValueError(
            f"prompt has {len(prompt)} tokens, expected none or as many as "
            f"input_embeddings has rows: {len(embeddings)}."
        )
