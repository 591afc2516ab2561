"""What the decode loop asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from ._batched import BatchDraftSession


class Proposal(Protocol):
    """Collects the draft tokens of a round.

    Attributes:
        vocab_size (int, optional): That of the target; None before it is known.
    """

    vocab_size: int | None

    @property
    def tokens(self) -> list[mx.array]:
        """Those added so far, each of shape ``[1]``."""
        ...

    def add(self, logits: mx.array) -> None:
        """Draw one from logits of shape ``[1, vocab]``."""
        ...


class DraftSession(Protocol):
    """A drafter at work on one sequence.

    A class that inherits from it has to define ``prefill`` and ``draft``. The others
    are for a session that keeps something, or puts something off.

    Invariant: when a call returns, the session has seen exactly the tokens it was
    given, but for those that it put off; what it computed for tokens that were only
    drafted is undone.
    """

    @property
    def num_put_off(self) -> int:
        """How many of the tokens it was given the session has still to process."""
        return 0

    @property
    def entries(self) -> Sequence[Any]:
        """What it keeps of the sequence in the prompt cache, behind the target's."""
        return ()

    @property
    def last_state(self) -> mx.array | None:
        """The state of the last token seen, ``[1, 1, hidden]``, if it is kept.

        Asked for before the session is shown anything.
        """
        return None

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        """See tokens of the prompt that the target has processed.

        Args:
            tokens (mx.array): Shape ``[num_tokens]``.
            states (mx.array, optional): What the target made of them,
              ``[1, num_tokens, hidden]``; None for a drafter that reads none.
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
              ``[1, num_tokens, hidden]``; None for a drafter that reads none, or if
              they are not known, and then nothing is to be drafted.
            num_draft_tokens (int): How many tokens to add. With 0 a session may put
              off what seeing the tokens takes.
            proposal (Proposal): Turns logits into draft tokens.
        """
        ...

    def catch_up(self) -> None:
        """Process the tokens that were put off."""
        return

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        """Leave the cache entries as if only ``num_tokens`` tokens had been seen.

        Args:
            num_tokens (int): Tokens in the target's cache.
            last_state (mx.array, optional): The state of the last one,
              ``[1, 1, hidden]``; None if generation ended within the prompt.
        """
        return


class Drafter(Protocol):
    """Proposes tokens for a target.

    A class that inherits from it has to define the attributes and ``open``. The others
    are for a drafter that keeps something of a sequence in its prompt cache.

    Attributes:
        name (str): The kind of drafter in a word, such as ``"mtp"``; statistics say
            with it where a token came from.
        reads_hidden_states (bool): Whether the drafter needs a target with
            ``hidden_states`` and ``project``.
        computes_drafts (bool): Whether its sessions propose tokens. If not, all drafts
            are copies of what stands in the context.
    """

    name: str
    reads_hidden_states: bool
    computes_drafts: bool = True

    def make_cache(self) -> list[Any]:
        """Empty entries for what the drafter keeps of a sequence, if anything."""
        return []

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> DraftSession:
        """Start on a sequence.

        Args:
            prompt_cache (list[Any]): The target's entries, followed by the drafter's
              own if an earlier session left them there. Entries are added in place.
            num_target_entries (int): How many entries are the target's.
            num_tokens (int): Tokens that the target's entries hold.
            tokens (Sequence[int]): These tokens, as far as they are known.
        """
        ...

    def open_batch(self) -> BatchDraftSession | None:
        """Start on several sequences; None if they must keep entries of their own."""
        from ._batched import SeparateSessions

        return SeparateSessions()
