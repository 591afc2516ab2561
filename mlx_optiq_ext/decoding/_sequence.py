"""One of the sequences that are decoded together."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .._options import NumDraftTokens
from ..drafters import Lookup
from ._rows import Verifier
from ._statistics import SpeculationStats


@dataclass
class SequenceOptions:
    """How one sequence of a batch is to be decoded.

    Args:
        num_draft_tokens (int or str): Tokens to draft in a round, 0 for none, or
          ``"auto"``.
        stats (SpeculationStats): Counts what happens.
        prompt_lookup (bool): Whether what stands in its context is copied as well.
        seed (int, optional): Decides what is sampled, whoever is decoded beside the
          sequence. Default: the global generator decides, when the sequence begins.
    """

    num_draft_tokens: NumDraftTokens = "auto"
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    seed: int | None = None
    prompt_lookup: bool = False


class Sequence:
    """What belongs to one sequence, whoever is decoded beside it.

    Invariant: ``tokens`` are those that were in the cache at the start, as far as they
    are known, the prompt as far as it was processed, and every token emitted.

    Args:
        uid (int): What the sequence is called.
        tokens (list[int]): Those that its cache holds already.
        verifier (Verifier): How tokens are drawn.
        max_tokens (int): Tokens to emit; no limit if negative.
        options (SequenceOptions): How to draft.
        matcher (StopSequences.Matcher, optional): Knows when to stop.
    """

    def __init__(
        self,
        uid: int,
        tokens: list[int],
        verifier: Verifier,
        max_tokens: int,
        options: SequenceOptions,
        matcher: Any = None,
    ):
        self.uid = uid
        self.tokens = tokens
        self.verifier = verifier
        self.options = options
        self.finish_reason: str | None = None
        # Whether a sampler or a logits processor of its own raised.
        self.has_failed = False
        # Tokens of the cache before the latest pass, and drawn before that.
        self.num_cached = self.num_cached_before = self.num_accepted = 0
        self._matcher = matcher
        self._max_tokens = math.inf if max_tokens < 0 else max_tokens
        self._num_emitted = 0
        self._history: mx.array | None = None
        self._lookup: Lookup | None = None

    @property
    def is_last(self) -> bool:
        """Whether no token follows those that were drawn."""
        has_ended = self.has_failed or self.finish_reason is not None
        return has_ended or self.num_accepted >= self._max_tokens

    def num_to_draft(self, wanted: int, max_rows: float) -> float:
        """How many tokens to draft for it in a pass.

        Args:
            wanted (int): For sequences that leave that open.
            max_rows (float): The most that the pass may have.
        """
        if self.is_last:
            return 0
        number = self.options.num_draft_tokens
        # The pass also emits one token of the target's own.
        num_rows = min(self._max_tokens - self.num_accepted, max_rows)
        return max(min(wanted if number == "auto" else number, num_rows - 1), 0)

    @property
    def history(self) -> mx.array | None:
        """What logits processors are shown, ``[num_tokens]``; None without any."""
        return self._history

    def remember(self, tokens: mx.array) -> None:
        """Extend what logits processors are shown, by tokens that may be unknown."""
        if not self.verifier.processors:
            return
        known = [mx.array(self.tokens)] if self.tokens else []
        history = known if self._history is None else [self._history]
        self._history = mx.concatenate([*history, tokens.astype(mx.uint32)])

    def open_lookup(self, cache: list[Any], num_tokens: int) -> None:
        """Begin to index the tokens, if they are to be copied.

        Args:
            cache (list[Any]): Entries, with the index of earlier ones if there is one.
            num_tokens (int): Tokens that they hold.
        """
        if self.options.prompt_lookup:
            self._lookup = Lookup.of(cache, num_tokens, self.tokens)

    def read(self, tokens: mx.array) -> None:
        """Index tokens of the prompt, ``[num_tokens]``."""
        if self._lookup is not None:
            self._lookup.read(tokens.tolist())

    def chances(self, num_tokens: int) -> list[float]:
        """How probable each of the tokens that can be copied is to be right."""
        return [] if self._lookup is None else self._lookup.chances(num_tokens)

    def copy(self, num_tokens: int) -> list[int]:
        """The next tokens, if the context goes on as it did before."""
        return [] if self._lookup is None else self._lookup.copy(num_tokens)

    def leave_index(self, cache: list[Any], num_tokens: int) -> None:
        """Let the index of the first tokens rest with entries that hold them."""
        if self._lookup is not None:
            self._lookup.rest_with(cache, num_tokens)

    def copy_index(self, cache: list[Any], num_tokens: int) -> None:
        """The same for entries of a sequence that goes on."""
        if self._lookup is not None:
            copy.deepcopy(self._lookup).rest_with(cache, num_tokens)

    def emit(self, tokens: list[int]) -> list[int]:
        """Those of the tokens that are emitted: all, unless one of them is the last."""
        for number, token in enumerate(tokens, 1):
            self.tokens.append(token)
            self._num_emitted += 1
            # In mlx-lm's order: a stop sequence wins over the limit.
            if self._matcher is not None and self._matcher.advance(token):
                self.finish_reason = "stop"
            elif self._num_emitted >= self._max_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                tokens = tokens[:number]
                break
        if self._lookup is not None:
            self._lookup.follow(tokens)
        return tokens
