"""One verify pass over several sequences, from its launch to the tokens it emits."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Numbers
from functools import cached_property
from itertools import islice

import mlx.core as mx

from ..drafters import COPIES, Committed
from ..grammars import masked
from ._acceptance import normalized
from ._plan import Plan
from ._rows import Proposal, Row, num_accepted_of
from ._sequence import Sequence
from ._target import Output

CERTAIN = "grammar"  # where a token came from that had to come


class BatchProposals:
    """The draft tokens of one pass, for each of its sequences.

    Args:
        sequences (Sequence[Sequence]): Whose rules the drafts follow.
        vocab_size (int): That of the target.
        source (str): The name of what computes drafts.
        num_wanted (Sequence[int]): How many tokens are to be computed for each.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        vocab_size: int,
        source: str,
        num_wanted: Numbers[int],
    ):
        self._sequences = list(sequences)
        self.each: list[Proposal] = [
            Proposal(each.verifier, each.history, each.num_accepted, vocab_size, number)
            for each, number in zip(self._sequences, num_wanted, strict=True)
        ]
        self._num_wanted = num_wanted
        # Whether more were added, because they are certain, than were wanted.
        self.is_lengthened = False
        self._vocab_size = vocab_size
        self._source = source
        self._are_plain = all(each.verifier.is_plain for each in sequences)
        self._latest: mx.array | None = None
        # Tokens that were drafted for all sequences at once, by their position.
        self._columns: list[mx.array] = []
        # Whether all tokens are the drafter's: none is copied or certain.
        self._are_drafted = True

    @property
    def latest(self) -> mx.array:
        assert self._latest is not None
        return self._latest

    def add(self, logits: mx.array) -> None:
        if self._are_plain:
            # One operation for all sequences, of which each then has its own token.
            logits = logits[:, : self._vocab_size]
            logits = masked(logits, [proposal.mask(logits) for proposal in self.each])
            tokens = mx.argmax(logits, axis=-1)
            for index, proposal in enumerate(self.each):
                proposal.append(tokens[index : index + 1])
            self._latest = tokens[:, None]
            self._columns.append(tokens.astype(mx.uint32))
            return
        for index, proposal in enumerate(self.each):
            proposal.add(logits[index : index + 1])
        self._latest = mx.stack([proposal.tokens[-1] for proposal in self.each])

    @property
    def num_drafts(self) -> list[int]:
        """How many draft tokens each sequence has."""
        return [len(proposal.drafts) for proposal in self.each]

    def settle(self, plan: Plan, num_certain: Numbers[int]) -> None:
        """Drop what is not wanted of the drafts, and take copies where these are.

        Args:
            plan (Plan): What is wanted.
            num_certain (Sequence[int]): How many tokens to have, where it is certain
                what comes.
        """
        for index, (number, num_copied) in enumerate(zip(*plan, strict=True)):
            proposal = self.each[index]
            proposal.drop(number)
            proposal.source = self._source
            if num_copied:
                proposal.source = COPIES
                self._are_drafted = False
                proposal.take(self._sequences[index].copy(num_copied))
            elif num_certain[index] > number:
                proposal.source = self._source if number else CERTAIN
                proposal.add_certain(num_certain[index])
                self.is_lengthened = True
                self._are_drafted = False

    @cached_property
    def matrix(self) -> mx.array:
        """Draft tokens ``[num_sequences, max(num_drafts)]``, with padding behind."""
        width, blank = max(self.num_drafts), mx.zeros(1, mx.uint32)
        if self._columns and self._are_drafted:
            return mx.stack(self._columns[:width], axis=1)
        rows = []
        for proposal in self.each:
            tokens = [token.astype(mx.uint32) for token in proposal.tokens]
            rows.append(mx.concatenate([*tokens, *[blank] * (width - len(tokens))]))
        return mx.stack(rows)


class Pass:
    """A pass of the target over the last token of each sequence and its draft tokens.

    ``dispatch`` builds and starts the work, ``collect`` waits for it. Then ``emitted``
    has for each sequence the tokens that were drawn, ``num_accepted`` how many of them
    were drafted, ``logprobs`` what they were drawn from, and ``errors`` what a sampler
    or a logits processor of the user's raised.

    Args:
        sequences (list[Sequence]): In the order of the rows.
        proposals (BatchProposals): The draft tokens.
        output (Output): Of the target.
        is_early (bool): Whether the pass before is still under way.
        does_more (bool): Whether sequences joined, or the drafter caught up.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        proposals: BatchProposals,
        output: Output,
        is_early: bool,
        does_more: bool,
    ):
        self.sequences = sequences
        self.num_drafted = proposals.num_drafts
        self.is_lengthened = proposals.is_lengthened
        self.sources = [proposal.source for proposal in proposals.each]
        self.is_early = is_early
        self.does_more = does_more
        self.is_collected = False
        self.output = output
        self.errors: dict[int, Exception] = {}
        self.emitted: list[list[int]] = [[] for _ in sequences]
        self.num_accepted = [0] * len(sequences)
        self.logprobs: list[list[mx.array]] = [[] for _ in sequences]
        self._proposals = proposals
        self._packed: list[tuple[int, mx.array]] = []
        # Drafts that the constraint of a sequence can follow.
        self._num_usable = list(self.num_drafted)
        # The same of several sequences, in the order of their indices.
        self._indices: list[int] = []
        self._rows_packed: mx.array | None = None

    @property
    def plan(self) -> Plan:
        """How many tokens were verified, by their source."""
        is_copied = [source == COPIES for source in self.sources]
        pairs = list(zip(self.num_drafted, is_copied, strict=True))
        return Plan([n * (not c) for n, c in pairs], [n * c for n, c in pairs])

    @property
    def is_certain(self) -> bool:
        """Whether it is known before the tokens are that each sequence emits one."""
        return not any(self.num_drafted) and not self.errors

    def dispatch(self) -> None:
        read = [i for i, x in enumerate(self.sequences) if not x.is_last]
        self._must_walk: list[int] = []
        if not read:
            # Nobody asks for a token after the last: no logits are computed.
            mx.async_eval(self.output.first)
            return
        self._logits = logits = self._constrained(self.output.logits, read)
        read = [i for i in read if i not in self.errors]
        plain = [i for i in read if self.sequences[i].verifier.is_plain]
        if plain:
            self._judge_plain(logits, plain)
        for index in (i for i in read if i not in plain):
            verifier = self.sequences[index].verifier
            if verifier.is_stepwise and self.num_drafted[index]:
                self._must_walk.append(index)
            else:
                self._judge(logits, index)
        mx.async_eval(
            [packed for _, packed in self._packed],
            [] if self._rows_packed is None else self._rows_packed,
            [rows for each in self.logprobs for rows in each],
            logits if self._must_walk else [],
        )

    def committed(self) -> Committed:
        """What the sequences emit, also before the tokens are known."""
        if not self.is_collected:
            ones = [1] * len(self.sequences)
            return Committed(self._first_tokens(), self.output.states, ones)
        width = max(map(len, self.emitted)) or 1
        padded = [tokens + [0] * (width - len(tokens)) for tokens in self.emitted]
        states = self.output.states
        return Committed(
            mx.array(padded, mx.uint32),
            None if states is None else states[:, :width],
            [len(tokens) for tokens in self.emitted],
        )

    def _first_tokens(self) -> mx.array:
        """The first token of each sequence, ``[num_sequences, 1]``."""
        packed = self._rows_packed
        if packed is not None and len(self._indices) == len(self.sequences):
            return packed[:, :1]
        tokens, blank = dict(self._packed), mx.zeros(1, mx.uint32)
        if packed is not None:
            tokens |= dict(zip(self._indices, packed, strict=True))
        rows = [tokens.get(i, blank)[:1] for i in range(len(self.sequences))]
        return mx.stack(rows).astype(mx.uint32)

    def collect(self) -> None:
        """Wait for the pass."""
        packed = [array for _, array in self._packed]
        if self._rows_packed is not None:
            packed.append(self._rows_packed.flatten())
        if packed:
            values = iter(mx.concatenate(packed).tolist())
            for index, array in self._packed:
                self._take(index, list(islice(values, array.size)))
            rest = list(values)
            width = len(rest) // max(len(self._indices), 1)
            for position, index in enumerate(self._indices):
                self._take(index, rest[position * width :][:width])
        for index in self._must_walk:
            self._walk(index)
        self.is_collected = True

    def _constrained(self, logits: mx.array, read: list[int]) -> mx.array:
        """Forbid what may not come, in all rows at once."""
        if all(self._proposals.each[index].lookahead is None for index in read):
            return logits
        # The pass is under way while the host works out the masks.
        mx.async_eval(logits)
        masks: list[bytes | None] = []
        for index, proposal in enumerate(self._proposals.each):
            rows: list[bytes | None] = []
            if index in read:
                try:
                    rows = proposal.masks()
                except Exception as error:
                    self.errors[index] = error
                if proposal.lookahead is not None:
                    usable = proposal.lookahead.num_usable
                    self._num_usable[index] = min(self.num_drafted[index], usable)
            masks += [*rows, *[None] * (logits.shape[1] - len(rows))]
        return masked(logits, masks)

    def _take(self, index: int, tokens: list[int]) -> None:
        """Read what was packed: tokens, and behind them how many were accepted."""
        if self.num_drafted[index]:
            self.num_accepted[index] = min(tokens[-1], self._num_usable[index])
        self.emitted[index] = tokens[: self.num_accepted[index] + 1]

    def _judge_plain(self, logits: mx.array, indices: list[int]) -> None:
        """Judge sequences that take the most probable token, all at once."""
        rows = mx.array(indices) if len(indices) < len(self.sequences) else slice(None)
        logprobs = normalized(logits[rows])
        packed = mx.argmax(logprobs, axis=-1).astype(mx.uint32)
        numbers = [self.num_drafted[index] for index in indices]
        for own, index, number in zip(logprobs, indices, numbers, strict=True):
            self.logprobs[index] = [own[row] for row in range(number + 1)]
        if any(numbers):
            is_right = packed[:, :-1] == self._proposals.matrix[rows]
            is_drafted = mx.arange(max(self.num_drafted)) < mx.array(numbers)[:, None]
            is_accepted = (is_right & is_drafted).astype(mx.uint32)
            num_accepted = mx.cumprod(is_accepted, axis=1).sum(axis=1, keepdims=True)
            packed = mx.concatenate([packed, num_accepted.astype(mx.uint32)], axis=1)
        self._indices, self._rows_packed = indices, packed

    def _judge(self, logits: mx.array, index: int) -> None:
        """Judge the rows of a sequence by its own rule."""
        try:
            rows = self._rows(logits, index)
        except Exception as error:
            self.errors[index] = error
            return
        self.logprobs[index] = [row.logprobs for row in rows]
        packed = [row.token.astype(mx.uint32) for row in rows]
        if self.num_drafted[index]:
            packed.append(num_accepted_of(rows).astype(mx.uint32))
        self._packed.append((index, mx.concatenate(packed)))

    def _rows(self, logits: mx.array, index: int) -> list[Row]:
        number = self.num_drafted[index]
        own = logits[index : index + 1, : number + 1]
        verifier = self.sequences[index].verifier
        return list(verifier.rows(own, self._proposals.each[index]))

    def _walk(self, index: int) -> None:
        """Judge row after row, none before its draft token is known to be accepted."""
        number, verifier = self.num_drafted[index], self.sequences[index].verifier
        own = self._logits[index : index + 1, : number + 1]
        usable = self._num_usable[index]
        try:
            for row in verifier.rows(own, self._proposals.each[index]):
                token, is_accepted = mx.concatenate(
                    [row.token, row.is_accepted]
                ).tolist()
                self.logprobs[index].append(row.logprobs)
                self.emitted[index].append(token)
                if not is_accepted or self.num_accepted[index] == usable:
                    break
                self.num_accepted[index] += 1
        except Exception as error:
            self.errors[index] = error
