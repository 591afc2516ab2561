"""Speculative generation as a stream of events, the API that mlx-optiq published.

    from mlx_lm.utils import load_model, load_tokenizer
    from mlx_optiq_ext.spec import GemmaAssistantDrafter, SpecConfig, spec_generate

    target, _ = load_model(path)
    tokenizer = load_tokenizer(path)
    drafter = GemmaAssistantDrafter.from_pretrained(assistant_path)
    for event in spec_generate(target, drafter, tokenizer, "Hello", SpecConfig()):
        print(event.text, end="", flush=True)

This module works whether or not mlx-lm is patched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    DEFAULT_PREFILL_STEP_SIZE,
    DEFAULT_QUANTIZED_KV_START,
    generation_stream,
    wired_limit,
)
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ._checkpoints import Source
from ._options import NumDraftTokens, check_num_draft_tokens
from .decoding import SpeculationStats, spec_generate_step
from .drafters import Drafter, GemmaAssistantDrafter, Unbound, as_drafter

__all__ = [
    "GemmaAssistantDrafter",
    "SpecConfig",
    "SpecEvent",
    "SpecStats",
    "spec_generate",
]


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """The settings of a generation.

    The arguments that are not listed have the meaning and the defaults that they have
    in mlx-lm's ``generate_step``.

    Args:
        gamma (int or str, optional): Another name of ``num_draft_tokens``.
        max_tokens (int): The most tokens to generate; -1 sets no limit.
        num_draft_tokens (int or str, optional): The number of tokens to draft in a
          round, from 1 to 8, or ``"auto"``. Default: ``1``, as published.

    Raises:
        ValueError: If ``gamma`` and ``num_draft_tokens`` differ, or if either of them,
          ``max_tokens`` or ``prefill_step_size`` is out of range.
    """

    gamma: NumDraftTokens | None = None
    max_tokens: int = 256
    num_draft_tokens: NumDraftTokens | None = None
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prompt_cache: list[Any] | None = None
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __post_init__(self) -> None:
        given = [n for n in (self.gamma, self.num_draft_tokens) if n is not None] or [1]
        for number in given:
            check_num_draft_tokens(number)
        if len(set(given)) > 1:
            raise ValueError(
                "gamma and num_draft_tokens are the same thing, got "
                f"{self.gamma} and {self.num_draft_tokens}."
            )
        object.__setattr__(self, "gamma", given[0])
        object.__setattr__(self, "num_draft_tokens", given[0])
        if not _is_int(self.max_tokens) or self.max_tokens < -1 or not self.max_tokens:
            raise ValueError(
                "max_tokens must be a whole number from 1 on, or -1 for no limit, got "
                f"{self.max_tokens!r}."
            )
        if not _is_int(self.prefill_step_size) or self.prefill_step_size < 1:
            raise ValueError(
                "prefill_step_size must be a whole number from 1 on, got "
                f"{self.prefill_step_size!r}."
            )


@dataclass(frozen=True, slots=True)
class SpecStats:
    """The counts of a generation.

    Args:
        num_emitted (int): The number of tokens generated.
        num_drafted (int): The number of draft tokens verified.
        num_accepted (int): The number of draft tokens emitted.
        num_target_calls (int): The number of forward passes of the target that emitted
          tokens.
        elapsed_seconds (float): The seconds from the call to the last token, the
          processing of the prompt included.
    """

    num_emitted: int
    num_drafted: int
    num_accepted: int
    num_target_calls: int
    elapsed_seconds: float

    @property
    def acceptance_rate(self) -> float:
        """The number of tokens accepted, divided by the number drafted."""
        return self.num_accepted / max(self.num_drafted, 1)


@dataclass(frozen=True, slots=True)
class SpecEvent:
    """One token of a generation, or its end.

    Args:
        kind (str): ``"token"``, or ``"done"`` for the last event.
        text (str): The text that the token completes, which may be empty.
        token_id (int, optional): The token. None in the last event.
        from_draft (bool): Whether the token was drafted.
        stats (SpecStats, optional): The counts of the generation. None in every event
          but the last.
    """

    kind: Literal["token", "done"]
    text: str = ""
    token_id: int | None = None
    from_draft: bool = False
    stats: SpecStats | None = None


def spec_generate(
    target: nn.Module,
    drafter: Drafter | Unbound | nn.Module | Source | None,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    config: SpecConfig | None = None,
) -> Generator[SpecEvent, None, None]:
    """Generate text, several tokens to a forward pass of the target.

    The tokens are those that mlx-lm's ``stream_generate`` yields. The token that ends
    the text is among them, and its own text is empty.

    Args:
        target (nn.Module): The model, as ``mlx_lm.utils.load_model`` returns it.
        drafter (Drafter, nn.Module, str or Path, optional): A drafter, an ordinary
          draft model, or the folder or Hub id of one of them. None means the target's
          own MTP head.
        tokenizer (TokenizerWrapper): The tokenizer, as ``mlx_lm.utils.load_tokenizer``
          returns it, or a tokenizer of transformers.
        prompt (str, list or mx.array): A text, or tokens of shape ``[num_tokens]``.
        config (SpecConfig, optional): The settings of the generation.

    Yields:
        SpecEvent: An event for each token, then one with the counts.

    Raises:
        ValueError: If the drafter or the prompt is malformed.
        SpeculationError: If the drafter cannot draft for this target.
    """
    start = time.perf_counter()
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    config = config or SpecConfig()
    counts = SpeculationStats()
    steps = spec_generate_step(
        _encode(tokenizer, prompt),
        target,
        drafter=as_drafter(drafter, target),
        num_draft_tokens=config.num_draft_tokens or 1,
        stats=counts,
        max_tokens=config.max_tokens,
        sampler=config.sampler,
        logits_processors=config.logits_processors,
        prompt_cache=config.prompt_cache,
        prefill_step_size=config.prefill_step_size,
        kv_bits=config.kv_bits,
        kv_group_size=config.kv_group_size,
        quantized_kv_start=config.quantized_kv_start,
    )
    return _events(target, tokenizer, steps, counts, config.max_tokens, start)


def _events(
    target: nn.Module,
    tokenizer: TokenizerWrapper,
    steps: Generator[tuple[int, mx.array, bool], None, None],
    counts: SpeculationStats,
    max_tokens: int,
    start: float,
) -> Generator[SpecEvent, None, None]:
    detokenizer = tokenizer.detokenizer
    with wired_limit(target, [generation_stream]), contextlib.closing(steps):
        for token, _, from_draft in steps:
            is_end = token in tokenizer.eos_token_ids
            if not is_end:
                detokenizer.add_token(token)
            if is_last := is_end or counts.num_tokens == max_tokens:
                detokenizer.finalize()
            yield SpecEvent("token", detokenizer.last_segment, token, from_draft)
            if is_last:
                break
    yield SpecEvent("done", stats=_stats(counts, time.perf_counter() - start))


def _stats(counts: SpeculationStats, elapsed_seconds: float) -> SpecStats:
    return SpecStats(
        num_emitted=counts.num_tokens,
        num_drafted=counts.num_drafted,
        num_accepted=counts.num_accepted,
        num_target_calls=counts.num_target_calls,
        elapsed_seconds=elapsed_seconds,
    )


def _encode(tokenizer: TokenizerWrapper, prompt: Any) -> mx.array:
    """Encode a prompt in the way of mlx-lm's ``stream_generate``."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        prompt = tokenizer.encode(
            prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
        )
    return prompt if isinstance(prompt, mx.array) else mx.array(prompt)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
