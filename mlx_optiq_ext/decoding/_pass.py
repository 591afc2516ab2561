"""One verify pass over several sequences, from its launch to the tokens it emits."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from ..drafters import COPIES, Committed
from ._acceptance import normalized
from ._plan import Plan
from ._rows import Proposal, Row, num_accepted_of
from ._sequence import Sequence
from ._target import Output


class BatchProposals:
    """The draft tokens of one pass, for each of its sequences.

    Args:
        sequences (Sequence[Sequence]): Whose rules the drafts follow.
        vocab_size (int): That of the target.
        source (str): The name of what computes drafts.
    """

    def __init__(self, sequences: Iterable[Sequence], vocab_size: int, source: str):
        self._sequences = list(sequences)
        self.each: list[Proposal] = [
            Proposal(each.verifier, each.history, each.num_accepted, vocab_size)
            for each in self._sequences
        ]
        self._vocab_size = vocab_size
        self._source = source
        self._are_plain = all(each.verifier.is_plain for each in sequences)
        self._latest: mx.array | None = None

    @property
    def latest(self) -> mx.array:
        assert self._latest is not None
        return self._latest

    def add(self, logits: mx.array) -> None:
        if self._are_plain:
            # One operation for all sequences, of which each then has its own token.
            tokens = mx.argmax(logits[:, : self._vocab_size], axis=-1)
            for index, proposal in enumerate(self.each):
                proposal.append(tokens[index : index + 1])
            self._latest = tokens[:, None]
            return
        for index, proposal in enumerate(self.each):
            proposal.add(logits[index : index + 1])
        self._latest = mx.stack([proposal.tokens[-1] for proposal in self.each])

    @property
    def num_drafts(self) -> list[int]:
        """How many draft tokens each sequence has."""
        return [len(proposal.drafts) for proposal in self.each]

    def settle(self, plan: Plan) -> None:
        """Drop what is not wanted of the drafts, and take copies where these are."""
        for sequence, proposal, number, num_copied in zip(
            self._sequences, self.each, *plan, strict=True
        ):
            proposal.drop(number)
            proposal.source = self._source
            if num_copied:
                proposal.source = COPIES
                for token in sequence.copy(num_copied):
                    proposal.append(mx.array([token], mx.uint32))

    def matrix(self) -> mx.array:
        """Draft tokens ``[num_sequences, max(num_drafts)]``; padded with 0."""
        width, blank = max(self.num_drafts), mx.zeros(1, mx.uint32)
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
        self.sources = [proposal.source for proposal in proposals.each]
        self.is_early = is_early
        self.does_more = does_more
        self.is_collected = False
        self.output = output
        self.errors: dict[int, Exception] = {}
        self.emitted: list[list[int]] = [[] for _ in sequences]
        self.num_accepted = [0] * len(sequences)
        self.logprobs: list[list[mx.array]] = [[] for _ in sequences]
        self._proposals = proposals.each
        self._packed: list[tuple[int, mx.array]] = []

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
        logits = self.output.logits
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
            [rows for each in self.logprobs for rows in each],
            logits if self._must_walk else [],
        )

    def committed(self) -> Committed:
        """What the sequences emit, also before the tokens are known."""
        if not self.is_collected:
            tokens = dict(self._packed)
            blank = mx.zeros(1, mx.uint32)
            rows = [tokens.get(i, blank)[:1] for i in range(len(self.sequences))]
            return Committed(
                mx.stack(rows).astype(mx.uint32), self.output.states, [1] * len(rows)
            )
        width = max(map(len, self.emitted)) or 1
        padded = [tokens + [0] * (width - len(tokens)) for tokens in self.emitted]
        states = self.output.states
        return Committed(
            mx.array(padded, mx.uint32),
            None if states is None else states[:, :width],
            [len(tokens) for tokens in self.emitted],
        )

    def collect(self) -> None:
        """Wait for the pass."""
        if self._packed:
            values = mx.concatenate([x for _, x in self._packed]).tolist()
            for index, packed in self._packed:
                tokens = [int(value) for value in values[: packed.size]]
                del values[: packed.size]
                self._take(index, tokens)
        for index in self._must_walk:
            self._walk(index)
        self.is_collected = True

    def _take(self, index: int, tokens: list[int]) -> None:
        if self.num_drafted[index]:
            self.num_accepted[index] = tokens.pop()
        self.emitted[index] = tokens[: self.num_accepted[index] + 1]

    def _judge_plain(self, logits: mx.array, indices: list[int]) -> None:
        """Judge sequences that take the most probable token, all at once."""
        if len(indices) < len(self.sequences):
            logits = logits[mx.array(indices)]
        logprobs = normalized(logits)
        tokens = mx.argmax(logprobs, axis=-1).astype(mx.uint32)
        for position, index in enumerate(indices):
            number = self.num_drafted[index]
            rows = range(number + 1)
            self.logprobs[index] = [logprobs[position, row] for row in rows]
            found = tokens[position, : number + 1]
            if number:
                drafts = mx.concatenate(self._proposals[index].tokens)
                is_accepted = (found[:-1] == drafts).astype(mx.int32)
                num_accepted = mx.cumprod(is_accepted).sum(keepdims=True)
                found = mx.concatenate([found, num_accepted.astype(mx.uint32)])
            self._packed.append((index, found))

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
        return list(verifier.rows(own, self._proposals[index]))

    def _walk(self, index: int) -> None:
        """Judge row after row, none before its draft token is known to be accepted."""
        number, verifier = self.num_drafted[index], self.sequences[index].verifier
        own = self.output.logits[index : index + 1, : number + 1]
        try:
            for row in verifier.rows(own, self._proposals[index]):
                token, is_accepted = mx.concatenate(
                    [row.token, row.is_accepted]
                ).tolist()
                self.logprobs[index].append(row.logprobs)
                self.emitted[index].append(token)
                if not is_accepted:
                    break
                self.num_accepted[index] += 1
        except Exception as error:
            self.errors[index] = error
