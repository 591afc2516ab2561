"""The grid of cases in which company must change nothing, to the bit.

Sequences come, end and are cancelled at random turns, and each is compared with the
same request alone and without speculation.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import StopSequences, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_optiq_ext.decoding import (
    SequenceOptions,
    SpeculationStats,
    SpeculativeBatchGenerator,
    _batch,
)
from mlx_optiq_ext.drafters import Proposal, SeparateSessions
from tests.gemma import E4B, load_target
from tests.helpers import (
    DEMO,
    ChangingDepth,
    assert_same_cache,
    load_tiny,
    often_right,
)

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "model": ("dense", "moe", "dense-4bit", "demo", "gemma"),
    "num_sequences": (2, 3, 4, 6),
    "drafter": ("own", "script"),
    "num_draft_tokens": (1, 2, 3, 4, "changing", "mixed"),
    "joins": ("at once", "one by one", "at random"),
    "leaves": ("limit", "stop", "cancelled"),
    "processors": ("none", "one", "all"),
    "caches": ("cold", "warm"),
    "prefill_step_size": (8, 512),
}
MAX_TOKENS = 33
LENGTHS = (17, 1, 130, 2, 700, 5)
PROCESSORS: dict[str, Sequence[int]] = {"none": (), "one": (1,), "all": range(6)}


class Case(NamedTuple):
    model: str
    num_sequences: int
    drafter: str
    num_draft_tokens: int | str
    joins: str
    leaves: str
    processors: str
    caches: str
    prefill_step_size: int


class Wanted(NamedTuple):
    """What a sequence is asked for, and what it gives alone and plain."""

    warm: list[int]
    prompt: list[int]
    max_tokens: int
    stop: list[int] | None
    processors: list[Any] | None
    tokens: list[int]
    logprobs: list[mx.array]
    finish_reason: str


def all_cases() -> Iterator[Case]:
    return itertools.starmap(Case, itertools.product(*DIMENSIONS.values()))


def covering_cases() -> list[Case]:
    """Cases in which every pair of values of two dimensions occurs."""
    missing = {
        pair
        for one, other in itertools.combinations(enumerate(DIMENSIONS.values()), 2)
        for pair in itertools.product(
            *([(index, value) for value in choices] for index, choices in (one, other))
        )
    }
    chooser, chosen = random.Random(2), []
    while missing:
        candidates = [
            Case(*map(chooser.choice, DIMENSIONS.values())) for _ in range(300)
        ]
        best = max(candidates, key=lambda case: len(missing & pairs(case)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


@cache
def model_of(kind: str) -> nn.Module:
    if kind == "gemma":
        return load_target(E4B)
    if kind == "demo":
        return mlx_lm.load(str(DEMO))[0]
    return load_tiny(kind)


class BookDrafter:
    """Proposes what each of several sequences emits when it is plain, and alone.

    Args:
        books (list[list[int]]): The tokens of each sequence from its start.
        vocab_size (int): Size of the vocabulary.
    """

    name = "book"
    reads_hidden_states = False
    computes_drafts = True

    def __init__(self, books: list[list[int]], vocab_size: int):
        self.books = books
        self.vocab_size = vocab_size

    def make_cache(self) -> list[Any]:
        return []

    def open(self, *args: Any) -> BookSession:
        return BookSession(self, list(args[3]))

    def open_batch(self) -> SeparateSessions:
        return SeparateSessions()


class BookSession:
    last_state = None
    num_put_off = 0
    entries = ()

    def __init__(self, drafter: BookDrafter, seen: list[int]):
        self.drafter = drafter
        self.seen = seen

    def prefill(self, tokens: mx.array, states: Any, embeddings: Any = None) -> None:
        self.seen = [*self.seen, *tokens.tolist()]

    def draft(
        self, tokens: mx.array, states: Any, num_draft_tokens: int, proposal: Proposal
    ) -> None:
        self.prefill(tokens, states)
        drafter, position = self.drafter, len(self.seen)
        books = [book for book in drafter.books if book[:position] == self.seen]
        book = [*books[0], *[0] * 8] if books else [0] * (position + 8)
        for place in range(position, position + num_draft_tokens):
            token = book[place]
            if not often_right(place):
                token = (token + 1) % drafter.vocab_size
            is_token = mx.arange(drafter.vocab_size) == token
            proposal.add(mx.where(is_token, 30.0, 0.0)[None])

    def catch_up(self) -> None:
        pass

    def close(self, *_: Any) -> None:
        pass


def wanted(case: Case, index: int) -> Wanted:
    """One of the sequences of a case, generated alone and without speculation."""
    model, vocab_size = model_of(case.model), vocab_size_of(case.model)
    length = LENGTHS[index]
    key = mx.random.key(7 * index + 1)
    prompt = mx.random.randint(0, vocab_size, (length,), key=key).tolist()
    num_warm = length // 2 if case.caches == "warm" else 0
    processors = None
    if index in PROCESSORS[case.processors]:
        processors = make_logits_processors({3 + index: 1.5}, 1.2 + 0.1 * index)
    max_tokens = MAX_TOKENS - 5 * (index % 4)
    steps = list(
        generate_step(
            mx.array(prompt[num_warm:]),
            model,
            max_tokens=max_tokens,
            prompt_cache=warm_cache(case, prompt[:num_warm]),
            prefill_step_size=case.prefill_step_size,
            logits_processors=_seeing(processors, prompt[:num_warm]),
        )
    )
    tokens, reason, stop = [token for token, _ in steps], "length", None
    if case.leaves == "stop" and index % 2 == 0:
        stop = tokens[9:11]
        end = next(n for n in range(2, len(tokens) + 1) if tokens[n - 2 : n] == stop)
        steps, reason = steps[:end], "stop"
    return Wanted(
        prompt[:num_warm],
        prompt[num_warm:],
        max_tokens,
        stop,
        processors,
        [token for token, _ in steps],
        [logprobs for _, logprobs in steps],
        reason,
    )


def _seeing(processors: list[Any] | None, tokens: list[int]) -> list[Any] | None:
    """Processors that are shown tokens of a warm cache too, as in mlx-lm's batch."""
    if processors is None or not tokens:
        return processors
    known = mx.array(tokens)
    return [
        lambda history, logits, each=each: each(
            mx.concatenate([known, history]), logits
        )
        for each in processors
    ]


def vocab_size_of(kind: str) -> int:
    model = model_of(kind)
    return model(mx.array([[1]])).shape[-1]


def warm_cache(case: Case, tokens: list[int]) -> list[Any]:
    prompt_cache = make_prompt_cache(model_of(case.model))
    if tokens:
        model_of(case.model)(mx.array([tokens]), cache=prompt_cache)
        mx.eval([entry.state for entry in prompt_cache])
    return prompt_cache


def check(case: Case) -> int:
    """Compare every sequence; how many draft tokens were accepted."""
    model = model_of(case.model)
    sequences = [wanted(case, index) for index in range(case.num_sequences)]
    if case.drafter == "own" and case.model != "gemma":
        options: dict[str, Any] = {}
    else:
        books = [[*x.warm, *x.prompt, *x.tokens] for x in sequences]
        options = {"drafter": BookDrafter(books, vocab_size_of(case.model))}
    is_changing = case.num_draft_tokens in ("changing", "mixed")
    changing = mock.patch.object(
        _batch, "AutoDepth", side_effect=lambda _: ChangingDepth(PATTERN)
    )
    with changing if is_changing else nullcontext():
        return Run(case, model, sequences, options).check()


PATTERN = (0, 0, 1, 2, 0, 3, 0, 0, 0, 4, 1, 0, 1, 1)


class Run:
    """One run of a batch through a case."""

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        sequences: list[Wanted],
        options: dict[str, Any],
    ):
        self.case = case
        self.chance = random.Random(str(case))
        self.sequences = sequences
        self.generator = SpeculativeBatchGenerator(
            model, prefill_step_size=case.prefill_step_size, **options
        )
        self.stats: dict[int, SpeculationStats] = {}
        self.found: dict[int, list[Any]] = {}
        self.cancelled: set[int] = set()
        self.ends: dict[int, Any] = {}

    def check(self) -> int:
        for number, each in enumerate(self.sequences):
            self._insert(number, each)
            for _ in range(self._pause()):
                self._step()
        while len(self.ends) + len(self.cancelled) < len(self.sequences):
            self._step()
        for number, each in enumerate(self.sequences):
            self._compare(number, each)
        return sum(stats.num_accepted for stats in self.stats.values())

    def _insert(self, number: int, each: Wanted) -> None:
        (uid,) = self.generator.insert(
            [each.prompt],
            [each.max_tokens],
            caches=[warm_cache(self.case, each.warm)],
            all_tokens=[list(each.warm)],
            logits_processors=[each.processors or []],
            stop_sequences=[StopSequences([each.stop] if each.stop else None)],
        )
        assert uid == number
        numbers: Any = self.case.num_draft_tokens
        if numbers == "changing":
            numbers = "auto"
        elif numbers == "mixed":
            numbers = (2, "auto", 0)[number % 3]
        self.stats[uid] = SpeculationStats()
        self.generator.set_options(uid, SequenceOptions(numbers, self.stats[uid]))
        self.found[uid] = []

    def _pause(self) -> int:
        return {
            "at once": 0,
            "one by one": 3,
            "at random": self.chance.randrange(7),
        }[self.case.joins]

    def _step(self) -> None:
        for response in self.generator.next()[1]:
            assert response.uid not in self.cancelled
            self.found[response.uid].append(response)
            if response.finish_reason is not None:
                self.ends[response.uid] = response
        if self.case.leaves == "cancelled":
            self._cancel()

    def _cancel(self) -> None:
        """Let one in three leave in the middle, with its cache."""
        for uid, responses in self.found.items():
            is_over = uid in self.ends or uid in self.cancelled
            if uid % 3 == 0 and len(responses) > 6 and not is_over:
                self.cancelled.add(uid)
                ((entries, tokens),) = self.generator.remove([uid], True).values()
                each = self.sequences[uid]
                emitted = [response.token for response in responses]
                assert tokens == [*each.warm, *each.prompt, *emitted]
                assert_same_cache(self._plain_cache(each, len(emitted)), entries)

    def _compare(self, number: int, each: Wanted) -> None:
        responses = self.found[number]
        tokens = [response.token for response in responses]
        assert tokens == each.tokens[: len(tokens)], number
        for response, logprobs in zip(responses, each.logprobs, strict=False):
            assert mx.array_equal(response.logprobs.__wrapped__, logprobs).item()
        stats = self.stats[number]
        assert stats.num_tokens == len(tokens)
        if number in self.cancelled:
            return
        end = self.ends[number]
        assert len(tokens) == len(each.tokens)
        assert end.finish_reason == each.finish_reason
        assert end.all_tokens == [*each.warm, *each.prompt, *tokens]
        expected = self._plain_cache(each, len(tokens))
        assert_same_cache(expected, end.prompt_cache[: len(expected)])

    def _plain_cache(self, each: Wanted, num_tokens: int) -> list[Any]:
        prompt_cache = warm_cache(self.case, each.warm)
        steps = generate_step(
            mx.array(each.prompt),
            model_of(self.case.model),
            max_tokens=num_tokens,
            prompt_cache=prompt_cache,
            prefill_step_size=self.case.prefill_step_size,
            logits_processors=_seeing(each.processors, each.warm),
        )
        assert len(list(steps)) == num_tokens
        return prompt_cache
