"""One sequence from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ._loop import Loop
from ._prompts import Prompt
from ._sequence import Sequence

CLEAR_CACHE_INTERVAL = 256  # tokens, as in mlx-lm's generate_step

Token = tuple[int, mx.array, bool]
ProgressCallback = Callable[[int, int], None]

# The generation that is under way with a prompt cache, by the first entry of that.
_owners: WeakKeyDictionary[Any, Generation] = WeakKeyDictionary()


class Generation:
    """A generation that updates a prompt cache in place.

    Invariant: when it ends, for whatever reason, the cache holds the prompt, as far as
    it was processed, and the tokens taken.

    Args:
        prompt (Prompt): The sequence with its cache.
        loop (Loop): Decodes it.
    """

    def __init__(self, prompt: Prompt, loop: Loop):
        self._prompt = prompt
        self._sequence: Sequence = prompt.sequence
        self._loop = loop
        self._num_taken = 0
        self._has_started = self._is_settled = False
        _take_over(self, prompt.cache)

    def tokens(
        self,
        prompt: mx.array,
        embeddings: mx.array | None,
        step_size: int,
        callback: ProgressCallback,
    ) -> Generator[Token, None, None]:
        """Process the prompt and yield tokens."""
        num_tokens = len(prompt if embeddings is None else embeddings)
        try:
            callback(0, num_tokens)
            for chunk in _chunks(num_tokens - 1, step_size):
                self._prompt.process(*_rows(chunk, prompt, embeddings))
                callback(chunk.stop, num_tokens)
                mx.clear_cache()
            last = slice(num_tokens - 1, num_tokens)
            start = self._prompt.start(*_rows(last, prompt, embeddings))
            self._has_started = True
            self._loop.join([start])
            if self._sequence.is_last:
                mx.eval([entry.state for entry in self._prompt.cache])
                callback(num_tokens, num_tokens)
                return
            turns = self._turns()
            yield from self._first(turns, lambda: callback(num_tokens, num_tokens))
        finally:
            self.settle()

    def settle(self) -> None:
        """End, with the cache holding the prompt and the tokens taken, no more."""
        if self._is_settled:
            return
        self._is_settled = True
        if self._has_started:
            num_tokens = self._prompt.num_tokens + self._num_taken
            self._loop.leave(self._sequence, num_tokens)
        else:
            self._prompt.end()
        mx.async_eval([entry.state for entry in self._prompt.cache])

    def _first(
        self, turns: Iterator[Token], tell: Callable[[], None]
    ) -> Iterator[Token]:
        """The tokens, of which the first tells that the prompt was processed."""
        for number, token in enumerate(turns):
            if number == 0:
                tell()
            yield token

    def _turns(self) -> Iterator[Token]:
        while self._sequence.finish_reason is None:
            (emission,) = self._loop.turn().emissions
            for position, token in enumerate(emission.tokens):
                emission.count(position)
                self._num_taken += 1
                is_draft = position < emission.num_accepted
                yield token, emission.logprobs[position], is_draft
                if self._is_settled:
                    message = "The prompt cache was given to another generation."
                    raise RuntimeError(message)
                if self._num_taken % CLEAR_CACHE_INTERVAL == 1:
                    mx.clear_cache()
            if emission.error is not None:
                raise emission.error


def _chunks(num_tokens: int, step_size: int) -> Iterator[slice]:
    """The chunks of mlx-lm's ``generate_step``."""
    for start in range(0, num_tokens, step_size):
        yield slice(start, min(start + step_size, num_tokens))


def _rows(
    chunk: slice, prompt: mx.array, embeddings: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    return prompt[chunk], None if embeddings is None else embeddings[chunk]


def _take_over(generation: Generation, cache: list[Any]) -> None:
    """End a generation that was left where it is and has the same cache.

    Otherwise the garbage collector would end it, when another one may be under way.
    """
    if not cache:
        return
    if (owner := _owners.get(cache[0])) is not None:
        owner.settle()
    _owners[cache[0]] = generation
