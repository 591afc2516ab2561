"""Speculation in mlx-lm's batch generator: on while one sequence is being decoded.

A sequence that is alone is decoded in rounds; several are decoded as mlx-lm does it.
Between the two, cache entries are taken out of the batch and merged into one again by
mlx-lm's own functions, and nothing else is carried over but the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import wrapt
from mlx_lm.generate import (
    DEFAULT_QUANTIZED_KV_START,
    GenerationBatch,
    _merge_caches,
)
from mlx_lm.sample_utils import Sampler

from .._options import NumDraftTokens
from ..drafters import Drafter
from ._decoder import Decoder, Token
from ._depth import make_depth
from ._rows import Verifier
from ._statistics import SpeculationStats
from ._target import CacheOptions, Target

# For what must not wait until the device is through with the next round.
reading_stream = mx.new_thread_local_stream(mx.cpu)

CACHE_OPTIONS = CacheOptions(None, None, 64, DEFAULT_QUANTIZED_KV_START)


@dataclass
class SequenceOptions:
    """How one sequence of a batch is to be decoded.

    Args:
        num_draft_tokens (int or str): Tokens to draft in a round, 0 for none, or
          ``"auto"``.
        stats (SpeculationStats): Counts what happens.
    """

    num_draft_tokens: NumDraftTokens
    stats: SpeculationStats


class ReadableRow(wrapt.ObjectProxy):
    """An array that is computed already, of which entries are read at once.

    Whoever reads one with ``row[index].item()`` would otherwise wait for everything
    that was started in the meantime.
    """

    def __getitem__(self, index: Any) -> mx.array:
        with mx.stream(reading_stream):
            return self.__wrapped__[index]


class _Solo:
    """A sequence that is decoded in rounds.

    Args:
        decoder (Decoder): With the sequence's cache.
        token (mx.array): What the batch has drawn for the sequence and neither returned
          nor put into the cache, ``[1]``.
        logprobs (mx.array): Of it, ``[vocab]``.
    """

    def __init__(self, decoder: Decoder, token: mx.array, logprobs: mx.array):
        self._decoder = decoder
        self._rounds = decoder.resume(token, logprobs)

    def next(self) -> Iterator[Token]:
        """The tokens of the next round, counted as they are taken."""
        return self._decoder.emit(next(self._rounds))

    def end(self) -> None:
        """Leave the cache with every token taken."""
        self._rounds.close()

    def pause(self) -> None:
        """Leave the cache with every token taken but the last."""
        self._decoder.untake()
        self._rounds.close()


class SpeculativeBatch(GenerationBatch):
    """A generation batch that speculates while it has one row.

    Args:
        model (nn.Module): The target.
        fallback_sampler (Sampler): As for mlx-lm's batch.
        drafter (Drafter): What proposes tokens.
        options (Callable): Those of the sequence with an identifier.
    """

    def __init__(
        self,
        model: nn.Module,
        fallback_sampler: Sampler,
        drafter: Drafter,
        options: Callable[[int], SequenceOptions],
    ):
        self._solo: _Solo | None = None
        self._drafter = drafter
        self._options = options
        self._become(GenerationBatch.empty(model, fallback_sampler))

    def extend(self, batch: GenerationBatch) -> None:
        self._join()
        super().extend(batch)

    def filter(self, keep: list[int]) -> None:
        if keep:
            self._join()
            super().filter(keep)
        else:
            self._leave()

    def extract_cache(self, idx: int) -> list[Any]:
        self._join()
        return super().extract_cache(idx)

    def next(self) -> list[GenerationBatch.Response]:
        if self._solo is None and len(self.uids) == 1:
            self._part(self._options(self.uids[0]))
        if self._solo is None:
            responses = super().next()
        else:
            responses = list(self._responses(self._solo))
        for response in responses:
            response.logprobs = ReadableRow(response.logprobs)
        return responses

    def _part(self, options: SequenceOptions) -> None:
        """Take the only sequence out of the batch, to decode it in rounds."""
        if options.num_draft_tokens == 0:
            return
        self.prompt_cache = super().extract_cache(0)
        drafter = self._drafter
        processors = self.logits_processors[0] if self.logits_processors else ()
        decoder = Decoder(
            Target(
                self.model,
                drafter.reads_hidden_states,
                self.prompt_cache,
                CACHE_OPTIONS,
            ),
            drafter,
            Verifier(
                self.samplers[0] or self.fallback_sampler,
                processors,
                options.num_draft_tokens == "auto",
            ),
            make_depth(options.num_draft_tokens, self.model, drafter),
            self.max_tokens[0] - self._num_tokens[0],
            options.stats,
            self.tokens[0],
        )
        self._solo = _Solo(decoder, self._next_tokens, self._next_logprobs[0])

    def _join(self) -> None:
        """Make a batch of the sequence that is decoded in rounds."""
        if self._solo is None:
            return
        self._solo.pause()
        self._solo = None
        progress = {"_num_tokens": self._num_tokens, "_matchers": self._matchers}
        last_token = self.tokens[0].pop()
        batch = GenerationBatch(
            self.model,
            self.uids,
            mx.array([last_token], mx.uint32),
            _merge_caches([self.prompt_cache]),
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
        self._become(batch)
        self.__dict__.update(progress)

    def _leave(self) -> None:
        self._solo = None
        self._become(GenerationBatch.empty(self.model, self.fallback_sampler))

    def _become(self, batch: GenerationBatch) -> None:
        self.__dict__.update(batch.__dict__)

    def _responses(self, solo: _Solo) -> Iterator[GenerationBatch.Response]:
        for token, logprobs, _ in solo.next():
            finish_reason = self._advance(token)
            is_last = finish_reason is not None
            if is_last:
                solo.end()
            yield self.Response(
                uid=self.uids[0],
                token=token,
                logprobs=logprobs,
                finish_reason=finish_reason,
                prompt_cache=self.prompt_cache if is_last else None,
                all_tokens=self.tokens[0] if is_last else None,
            )
            if is_last:
                self._leave()
                return

    def _advance(self, token: int) -> str | None:
        """Count a token; the reason to end if it is the last."""
        self.tokens[0].append(token)
        self._num_tokens[0] += 1
        # In mlx-lm's order: a stop sequence wins over the limit.
        if self._matchers[0].advance(token):
            return "stop"
        return "length" if self._num_tokens[0] >= self.max_tokens[0] else None
