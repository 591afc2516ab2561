"""Drafting for several sequences at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from ._protocol import DraftSession, Proposal


@dataclass
class Committed:
    """Tokens that a pass emitted for each of several sequences.

    Args:
        tokens (mx.array): Shape ``[num_sequences, num_rows]``. Those of a sequence are
            the first in its row, and the target has not processed the last of them.
        states (mx.array, optional): The target's states that predicted them,
            ``[num_sequences, num_rows, hidden]``; None where the drafter reads none.
        num_rows (list[int]): How many tokens each sequence has. A sequence that ended
            has none.
    """

    tokens: mx.array
    states: mx.array | None
    num_rows: list[int]

    def filtered(self, indices: Sequence[int]) -> Committed:
        """Those of some sequences, in this order."""
        rows = mx.array(list(indices))
        states = None if self.states is None else self.states[rows]
        return Committed(self.tokens[rows], states, [self.num_rows[i] for i in indices])

    def of(self, index: int) -> tuple[mx.array, mx.array | None]:
        """Tokens ``[num_tokens]`` and states ``[1, num_tokens, hidden]`` of one."""
        num_rows = self.num_rows[index]
        states = self.states
        if states is not None:
            states = states[index : index + 1, :num_rows]
        return self.tokens[index, :num_rows], states

    @property
    def last(self) -> mx.array:
        """The last token of each sequence, ``[num_sequences, 1]``."""
        if max(self.num_rows) == 1:
            return self.tokens[:, :1]
        last = mx.array([[max(num_rows - 1, 0)] for num_rows in self.num_rows])
        return mx.take_along_axis(self.tokens, last, axis=1)

    @property
    def last_states(self) -> mx.array:
        """The state of the last row of each sequence, ``[num_sequences, 1, hidden]``.

        There must be states.
        """
        assert self.states is not None
        return row_of(self.states, self.num_rows)


def row_of(rows: mx.array, num_rows: Sequence[int]) -> mx.array:
    """The last row of each sequence, ``[num_sequences, 1, hidden]``.

    Args:
        rows (mx.array): ``[num_sequences, max(num_rows), hidden]``.
        num_rows (Sequence[int]): How many rows each sequence has.
    """
    if rows.shape[1] == 1:
        return rows
    last = mx.array([[[max(number - 1, 0)]] for number in num_rows])
    return mx.take_along_axis(rows, last, axis=1)


def together(parts: Sequence[Committed]) -> Committed:
    """What was committed for sequences of several passes."""
    if len(parts) == 1:
        return parts[0]
    num_rows = max(part.tokens.shape[1] for part in parts)
    states = [part.states for part in parts if part.states is not None]
    return Committed(
        mx.concatenate([_padded(part.tokens, num_rows) for part in parts]),
        mx.concatenate([_padded(x, num_rows) for x in states]) if states else None,
        [number for part in parts for number in part.num_rows],
    )


def in_order(parts: Sequence[Committed]) -> Iterator[Committed]:
    """Merge what was committed for the same sequences in passes one after another.

    Passes that emitted one token for every sequence are merged into the next one.
    """
    waiting: list[Committed] = []
    for part in parts:
        waiting.append(part)
        if part.tokens.shape[1] > 1:
            yield _merged(waiting)
            waiting = []
    if waiting:
        yield _merged(waiting)


def _merged(parts: Sequence[Committed]) -> Committed:
    states = [part.states for part in parts if part.states is not None]
    numbers = (part.num_rows for part in parts)
    return Committed(
        mx.concatenate([part.tokens for part in parts], axis=1),
        mx.concatenate(states, axis=1) if states else None,
        [sum(own) for own in zip(*numbers, strict=True)],
    )


def _padded(array: mx.array, num_rows: int) -> mx.array:
    """An array ``[sequences, rows, ...]`` with more rows, which nobody reads."""
    widths = [(0, 0), (0, num_rows - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return mx.pad(array, widths) if array.shape[1] < num_rows else array


class Proposals(Protocol):
    """Collects the draft tokens of several sequences."""

    @property
    def each(self) -> Sequence[Proposal]:
        """Those of each sequence."""
        ...

    @property
    def latest(self) -> mx.array:
        """The tokens added last, ``[num_sequences, 1]``."""
        ...

    def add(self, logits: mx.array) -> None:
        """Draw a token for each sequence from logits ``[num_sequences, vocab]``."""
        ...


class BatchDraftSession(Protocol):
    """A drafter at work on several sequences.

    Each joins with a session of its own and is released as one. What is promised of
    ``DraftSession`` holds for every sequence. A class that inherits from it has to
    define ``join``, ``release``, ``filter`` and ``draft``.
    """

    def is_behind(self, indices: Sequence[int]) -> bool:
        """Whether tokens of one of these sequences were put off."""
        return False

    @property
    def entries(self) -> Sequence[Any]:
        """All that the drafter keeps of the sequences, for its size."""
        return ()

    def join(self, session: Any) -> None:
        """Take in another sequence, the last one from now on.

        Args:
            session (DraftSession): One that the same drafter opened.
        """
        ...

    def release(self, index: int) -> DraftSession:
        """The session of a sequence, which is filtered out next."""
        ...

    def filter(self, indices: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        ...

    def draft(
        self, committed: Committed, num_draft_tokens: list[int], proposals: Proposals
    ) -> None:
        """See committed tokens, then propose so many for each sequence."""
        ...

    def catch_up(self) -> None:
        """Process the tokens that were put off."""
        return


class SeparateSessions(BatchDraftSession):
    """Sequences that are drafted for one after the other."""

    def __init__(self) -> None:
        self._sessions: list[DraftSession] = []

    def is_behind(self, indices: Sequence[int]) -> bool:
        return any(self._sessions[index].num_put_off for index in indices)

    @property
    def entries(self) -> list[Any]:
        return [entry for session in self._sessions for entry in session.entries]

    def join(self, session: DraftSession) -> None:
        self._sessions.append(session)

    def release(self, index: int) -> DraftSession:
        return self._sessions[index]

    def filter(self, indices: Sequence[int]) -> None:
        self._sessions = [self._sessions[index] for index in indices]

    def draft(
        self, committed: Committed, num_draft_tokens: list[int], proposals: Proposals
    ) -> None:
        for index, session in enumerate(self._sessions):
            if committed.num_rows[index]:
                tokens, states = committed.of(index)
                number, proposal = num_draft_tokens[index], proposals.each[index]
                session.draft(tokens, states, number, proposal)

    def catch_up(self) -> None:
        for session in self._sessions:
            session.catch_up()
