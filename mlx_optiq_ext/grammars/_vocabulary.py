"""A tokenizer as llguidance sees it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from .._errors import GrammarError
from ._library import library

_lock = Lock()
# By tokenizer, and by the tokens that end a reply, which users may add to.
_known: WeakKeyDictionary[Any, dict[frozenset[int], Vocabulary]] = WeakKeyDictionary()


class Vocabulary:
    """The tokens that a reply is made of.

    Args:
        tokenizer: One of transformers.
        end_tokens (frozenset[int]): Those that end a reply.
    """

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int]):
        self._inner = tokenizer
        self.end_tokens = end_tokens
        self.num_bytes = -(-len(tokenizer) // 8)

    @cached_property
    def tokenizer(self) -> Any:
        """What llguidance makes of the tokenizer, which takes it a moment.

        Raises:
            GrammarError: If it is not a fast one.
            ImportError: If llguidance is not installed.
        """
        bridge = library("llguidance.hf")
        try:
            return bridge.from_tokenizer(
                self._inner, eos_token=sorted(self.end_tokens) or None
            )
        except ValueError as error:
            raise GrammarError(
                "structured output needs a fast tokenizer, got "
                f"{type(self._inner).__name__}: {error}"
            ) from error

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of one of mlx-lm's tokenizers, which is made once.

        Args:
            tokenizer (TokenizerWrapper): With the tokens that end a reply.
        """
        end_tokens, inner = frozenset(tokenizer.eos_token_ids), tokenizer._tokenizer
        with _lock:
            found = _known.setdefault(inner, {})
            if end_tokens not in found:
                found[end_tokens] = cls(inner, end_tokens)
            return found[end_tokens]

    def only(self, tokens: Iterable[int]) -> bytes:
        """The mask that allows these tokens."""
        bits = bytearray(self.num_bytes)
        for token in tokens:
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    @cached_property
    def without_end(self) -> bytes:
        """The mask that allows all tokens but those that end a reply."""
        forbidden = int.from_bytes(self.only(self.end_tokens), "little")
        everything = (1 << 8 * self.num_bytes) - 1
        return (everything & ~forbidden).to_bytes(self.num_bytes, "little")


def either(mask: bytes, other: bytes) -> bytes:
    """The mask that allows what one of two masks allows."""
    size = max(len(mask), len(other))
    union = int.from_bytes(mask, "little") | int.from_bytes(other, "little")
    return union.to_bytes(size, "little")
