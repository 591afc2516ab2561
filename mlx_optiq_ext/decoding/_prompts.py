"""The prompts of sequences that are to be decoded together.

Each is processed by itself, in chunks between two passes, so that what is computed for
it is what plain decoding computes.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..drafters import Drafter
from ._loop import Start
from ._rows import Proposal
from ._sequence import Sequence
from ._target import CacheOptions, Output, Target


class Prompt:
    """A sequence whose prompt is being processed.

    Args:
        sequence (Sequence): The sequence.
        model (nn.Module): The target.
        drafter (Drafter): What proposes tokens.
        cache (list[Any], optional): Stock entries for the sequence, which are updated
            in place; the drafter's own are added behind them.
        options (CacheOptions): How to make and quantise entries.
    """

    def __init__(
        self,
        sequence: Sequence,
        model: nn.Module,
        drafter: Drafter,
        cache: list[Any] | None,
        options: CacheOptions,
    ):
        self.sequence = sequence
        self._target = Target(model, drafter.reads_hidden_states, cache, options)
        self._session = drafter.open(
            self.cache,
            self._target.num_entries,
            self._target.num_tokens,
            sequence.tokens,
        )
        self.num_tokens = self._target.num_tokens
        sequence.open_lookup(self.cache, self.num_tokens)

    @property
    def cache(self) -> list[Any]:
        return self._target.cache

    def process(self, tokens: mx.array, embeddings: mx.array | None = None) -> None:
        """Process tokens that are not the last of the prompt.

        Args:
            tokens (mx.array): ``[num_tokens]``.
            embeddings (mx.array, optional): Read in place of the tokens', which then
                may be none, ``[num_tokens, hidden]``.
        """
        output = self._forward(tokens, embeddings)
        self._session.prefill(tokens, output.states, embeddings)
        self._target.quantize()
        mx.eval([entry.state for entry in self.cache])

    def start(self, tokens: mx.array, embeddings: mx.array | None = None) -> Start:
        """Process the last token of the prompt and draw the first one after it.

        Args:
            tokens (mx.array): ``[1]``.
            embeddings (mx.array, optional): As for ``process``.
        """
        sequence = self.sequence
        output = self._forward(tokens, embeddings)
        self._session.prefill(tokens, output.states, embeddings)
        self._target.quantize()
        sequence.num_cached = sequence.num_cached_before = self.num_tokens
        start = Start(sequence, self.cache, self._session, output.states)
        if sequence.is_last:
            mx.async_eval(output.first)
            return start
        try:
            proposal = Proposal(sequence.verifier, sequence.history)
            (row,) = sequence.verifier.rows(output.logits, proposal)
            start.token, start.logprobs = row.token, row.logprobs
            mx.async_eval(row.token, row.logprobs)
        except Exception as error:
            start.error = error
        return start

    def _forward(self, tokens: mx.array, embeddings: mx.array | None) -> Output:
        self.sequence.read(tokens)
        output = self._target.forward(tokens, embeddings)
        self.sequence.remember(tokens)
        self.num_tokens += output.first.shape[1]
        return output

    def end(self) -> None:
        """Leave the cache as it is, in the middle of the prompt."""
        self._target.quantize()
        self._session.close(self.num_tokens, None)
        self.sequence.leave_index(self.cache, self.num_tokens)

    def snapshot(self) -> list[Any]:
        """A copy of the cache, which holds what was processed."""
        self._session.close(self.num_tokens, None)
        entries = copy.deepcopy(self.cache)
        self.sequence.copy_index(entries, self.num_tokens)
        return entries


class PromptBatch:
    """Prompts of several sequences, in the place of mlx-lm's ``PromptProcessingBatch``.

    Args:
        prompts (list[Prompt], optional): Those to begin with.
    """

    def __init__(self, prompts: list[Prompt] | None = None):
        self._prompts = prompts or []

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def uids(self) -> list[int]:
        return [prompt.sequence.uid for prompt in self._prompts]

    @property
    def tokens(self) -> list[list[int]]:
        """Of each sequence, those that its cache holds."""
        return [prompt.sequence.tokens for prompt in self._prompts]

    @property
    def prompt_cache(self) -> list[Any]:
        """All entries, for their size."""
        return [entry for prompt in self._prompts for entry in prompt.cache]

    def extend(self, batch: PromptBatch) -> None:
        self._prompts += batch._prompts

    def filter(self, keep: list[int]) -> None:
        self._prompts = [self._prompts[index] for index in keep]

    def split(self, indices: list[int]) -> PromptBatch:
        """Take some of the prompts out."""
        taken = [self._prompts[index] for index in sorted(indices)]
        self._prompts = [x for i, x in enumerate(self._prompts) if i not in indices]
        return PromptBatch(taken)

    def extract_cache(self, idx: int) -> list[Any]:
        return self._prompts[idx].snapshot()

    def prompt(self, tokens: list[list[int]]) -> None:
        """Process the next chunk of each prompt."""
        for prompt, chunk in zip(self._prompts, tokens, strict=True):
            if chunk:
                prompt.process(mx.array(chunk))
                prompt.sequence.tokens += chunk
        if any(tokens):
            mx.clear_cache()

    def generate(self, tokens: list[list[int]]) -> Starts:
        """Process the last token of each prompt."""
        starts = Starts()
        for prompt, last in zip(self._prompts, tokens, strict=True):
            starts.append(prompt.start(mx.array(last)))
            prompt.sequence.tokens += last
        return starts


class Starts(list[Start]):
    """Sequences that are to join, with their identifiers."""

    @property
    def uids(self) -> list[int]:
        return [start.sequence.uid for start in self]
