"""Continuous batching with speculation, by the interface of mlx-lm's generator."""

from __future__ import annotations

import copy
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from .._options import DraftVocab, NumDraftTokens, check_num_draft_tokens
from ..drafters import Drafter, as_drafter, limit_drafts
from ._batch import CACHE_OPTIONS, SpeculativeBatch
from ._prompts import Prompt, PromptBatch
from ._rows import Verifier
from ._sequence import Sequence, SequenceOptions
from ._statistics import SpeculationStats


class SpeculativeBatchGenerator(BatchGenerator):
    """Generates for several prompts at once, several tokens of each to a pass.

    It is used like mlx-lm's ``BatchGenerator``: ``insert`` prompts, then call ``next``
    or ``next_generated`` until nothing comes any more. A call may return several
    responses for a sequence.

        generator = SpeculativeBatchGenerator(model, max_tokens=100)
        uids = generator.insert([tokenizer.encode("Hello"), tokenizer.encode("Bye")])
        while responses := generator.next_generated():
            for response in responses:
                print(response.uid, response.token)

    Args:
        model (nn.Module): The target.
        drafter (Drafter or nn.Module, optional): What proposes tokens; a model is used
            as an ordinary draft model. Default: the target's own MTP head.
        num_draft_tokens (int or str): Tokens to draft in a pass for each sequence, 1 to
            8, or ``"auto"``: the number, 0 included, with which the most tokens of all
            sequences are measured to be generated in a second. Default: ``"auto"``.
        draft_vocab (int or path, optional): As for ``spec_generate_step``.
        prompt_lookup (bool): As for ``spec_generate_step``.

        The other arguments are those of ``BatchGenerator``.

    Raises:
        ValueError: If an argument is not what it should be.
        SpeculationError: If the drafter cannot draft for this target.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        drafter: Drafter | nn.Module | None = None,
        num_draft_tokens: NumDraftTokens = "auto",
        draft_vocab: DraftVocab | None = None,
        prompt_lookup: bool = False,
        max_tokens: int = 128,
        stop_tokens: list[list[int]] | None = None,
        sampler: Sampler | None = None,
        logits_processors: list[LogitsProcessor] | None = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
        max_kv_size: int | None = None,
        stream: Any = None,
    ):
        check_num_draft_tokens(num_draft_tokens)
        super().__init__(
            model,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            completion_batch_size=completion_batch_size,
            prefill_batch_size=prefill_batch_size,
            prefill_step_size=prefill_step_size,
            max_kv_size=max_kv_size,
            stream=stream,
        )
        found = limit_drafts(as_drafter(drafter, model, prompt_lookup), draft_vocab)
        self.speculate_with(found, num_draft_tokens, prompt_lookup)

    def speculate_with(
        self,
        drafter: Drafter,
        num_draft_tokens: NumDraftTokens = "auto",
        prompt_lookup: bool = False,
    ) -> None:
        """Begin to speculate, before anything was inserted."""
        self._drafter = drafter
        self._num_draft_tokens = num_draft_tokens
        self._prompt_lookup = prompt_lookup or not drafter.computes_drafts
        self._options: dict[int, SequenceOptions] = {}
        self._prompt_batch = PromptBatch()
        self._generation_batch = SpeculativeBatch(self.model, drafter)

    def set_options(self, uid: int, options: SequenceOptions) -> None:
        """Say how a sequence is to be decoded that was just inserted."""
        self._options[uid] = options

    def stats_of(self, uid: int) -> SpeculationStats:
        """What speculation does for a sequence that was just inserted, as counts."""
        return self._options_of(uid).stats

    def _options_of(self, uid: int) -> SequenceOptions:
        default = SequenceOptions(
            self._num_draft_tokens, prompt_lookup=self._prompt_lookup
        )
        return self._options.setdefault(uid, default)

    def _make_batch(self, n: int) -> PromptBatch:
        return PromptBatch([self._make_prompt() for _ in range(n)])

    def _make_prompt(self) -> Prompt:
        uid, segments, max_tokens, cache, tokens, sampler, processors, stop = (
            self._unprocessed_sequences.popleft()
        )
        total = sum(map(len, segments))
        self._currently_processing.append([segments, 0, total])
        options = self._options_of(uid)
        del self._options[uid]
        # How much is drafted depends on time and company, and must not be seen.
        sampler = self.sampler if sampler is None else sampler
        verifier = Verifier(sampler, processors, True, options.seed)
        sequence = Sequence(uid, tokens, verifier, max_tokens, options, stop.matcher())
        # mlx-lm's generator leaves the caches that it is given as they are.
        cache = copy.deepcopy(cache)
        return Prompt(sequence, self.model, self._drafter, cache, CACHE_OPTIONS)
