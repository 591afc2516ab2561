"""What the decode loop asks of a drafter."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx


class Proposal(Protocol):
    """Collects the draft tokens of a round."""

    @property
    def tokens(self) -> list[mx.array]:
        """Those added so far, each of shape ``[1]``."""
        ...

    def add(self, logits: mx.array) -> None:
        """Draw one from logits of shape ``[1, vocab]``."""
        ...


class DraftSession(Protocol):
    """A drafter at work on one sequence.

    Invariant: when a call returns, the session has seen exactly the tokens it was
    given; what it computed for tokens that were only drafted is undone.
    """

    @property
    def last_state(self) -> mx.array | None:
        """The state of the last token seen, ``[1, 1, hidden]``, if it is kept.

        Asked for before the session is shown anything.
        """
        ...

    def prefill(
        self, tokens: mx.array, states: mx.array, embeddings: mx.array | None = None
    ) -> None:
        """See tokens of the prompt that the target has processed.

        Args:
            tokens (mx.array): Shape ``[num_tokens]``.
            states (mx.array): What the target made of them,
              ``[1, num_tokens, hidden]``.
            embeddings (mx.array, optional): What the target read in place of the
              embedded tokens, ``[num_tokens, hidden]``.
        """
        ...

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        """See committed tokens, then add what may follow them to the proposal.

        Args:
            tokens (mx.array): The tokens emitted since the last call, shape
              ``[num_tokens]``. The target has not processed the last one.
            states (mx.array): The target's states that predicted them,
              ``[1, num_tokens, hidden]``; None if they are not known, and then
              nothing is to be drafted.
            num_draft_tokens (int): How many tokens to add. With 0 a session may put
              off what seeing the tokens takes.
            proposal (Proposal): Turns logits into draft tokens.
        """
        ...

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        """Leave the cache entries as if only ``num_tokens`` tokens had been seen.

        Args:
            num_tokens (int): Tokens in the target's cache.
            last_state (mx.array, optional): The state of the last one,
              ``[1, 1, hidden]``; None if generation ended within the prompt.
        """
        ...


class Drafter(Protocol):
    """Proposes tokens for a target.

    ``reads_hidden_states`` drafters need a target with ``hidden_states`` and
    ``project``; the states of any other target are its logits.
    """

    reads_hidden_states: bool

    def make_cache(self) -> list[Any]:
        """Empty entries for what the drafter keeps of a sequence, if anything."""
        ...

    def open(
        self, prompt_cache: list[Any], num_target_entries: int, num_tokens: int
    ) -> DraftSession:
        """Start on a sequence.

        Args:
            prompt_cache (list[Any]): The target's entries, followed by the drafter's
              own if an earlier session left them there. Entries are added in place.
            num_target_entries (int): How many entries are the target's.
            num_tokens (int): Tokens that the target's entries hold.
        """
        ...
