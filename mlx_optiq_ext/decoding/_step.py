"""One sequence, generated as mlx-lm's ``generate_step`` does it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from collections.abc import Sequence as Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, generation_stream
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.utils import does_model_support_input_embeddings

from .._options import DraftVocab, NumDraftTokens, check_num_draft_tokens
from ..drafters import Drafter, as_drafter, limit_drafts
from ._depth import make_depth
from ._generation import Generation, ProgressCallback, Token
from ._loop import Loop
from ._plan import make_planner
from ._prompts import Prompt
from ._rows import Verifier
from ._sequence import Sequence, SequenceOptions
from ._statistics import SpeculationStats
from ._target import CacheOptions


def spec_generate_step(
    prompt: mx.array,
    model: nn.Module,
    stream: mx.Stream | mx.ThreadLocalStream = generation_stream,
    *,
    drafter: Drafter | nn.Module | None = None,
    num_draft_tokens: NumDraftTokens = "auto",
    draft_vocab: DraftVocab | None = None,
    prompt_lookup: bool = False,
    stats: SpeculationStats | None = None,
    seed: int | None = None,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Collection[LogitsProcessor] | None = None,
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
        num_draft_tokens (int or str): Tokens to draft in a round, 1 to 8, or ``"auto"``
          for the number, 0 included, that is measured to be the fastest. Default:
          ``"auto"``.
        draft_vocab (int or path, optional): Let an MTP head propose only so many
          tokens, or those whose ids a file has, one a line or as a JSON list. Default:
          any token.
        prompt_lookup (bool): Draft what followed the last tokens where they occurred
          before, in the prompt or the output: besides the drafter, or alone if none is
          given. It needs no model and works for every target.
        stats (SpeculationStats, optional): Counts what happens.
        seed (int, optional): Decides what is sampled, whatever is drafted. Default: the
          global generator decides.

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
    drafter = limit_drafts(as_drafter(drafter, model, prompt_lookup), draft_vocab)
    options = CacheOptions(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    sequence_options = SequenceOptions(
        num_draft_tokens,
        SpeculationStats() if stats is None else stats,
        seed,
        prompt_lookup or not drafter.computes_drafts,
    )
    with mx.stream(stream):
        is_timed = seed is not None or num_draft_tokens == "auto"
        verifier = Verifier(sampler, logits_processors, is_timed, seed)
        sequence = Sequence(0, [], verifier, max_tokens, sequence_options)
        depth = make_depth(num_draft_tokens, model, drafter)
        planner = make_planner(depth, model, drafter)
        generation = Generation(
            Prompt(sequence, model, drafter, prompt_cache, options),
            Loop(model, drafter, planner, options),
        )
        tokens = generation.tokens(
            prompt,
            input_embeddings,
            prefill_step_size,
            prompt_progress_callback or (lambda *_: None),
        )
        with contextlib.closing(tokens):
            yield from tokens


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
