"""Limits the tokens that an MTP head may propose to a part of the vocabulary.

Most of the cost of a draft is the product with the target's output layer, which has one
row for each token of the vocabulary. Rows are independent, quantised or not, so a layer
of some of the rows is cheaper and gives those tokens the same logits. The output stays
exact: a token that cannot be proposed is added by the target itself.

Source: FR-Spec (arXiv:2502.14856).
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._checkpoints import read_json
from .._errors import SpeculationError
from .._options import DraftVocab
from .._record import record_of
from ..mixins import MTPMixin

_TABLES = (nn.Embedding, nn.QuantizedEmbedding)
_LAYERS = (*_TABLES, nn.Linear, nn.QuantizedLinear)


class SubsetProjection:
    """The output layer of a model, reduced to some of the tokens.

    Args:
        layer (nn.Module): The whole output layer, or an embedding used as one.
        tokens (Sequence[int]): The tokens to keep, in ascending order.
    """

    def __init__(self, layer: nn.Module, tokens: Sequence[int]):
        self._layer = layer
        self._parts = [_Rows(layer, tokens)]
        self._dropped = mx.array([], mx.int32)
        self.tokens = tuple(tokens)

    def exchanged(self, tokens: Sequence[int]) -> SubsetProjection:
        """Make a projection to other tokens that shares the rows copied already.

        Only the rows of tokens that this projection does not have are copied.

        Args:
            tokens (Sequence[int]): The tokens to keep, in ascending order.
        """
        found = copy.copy(self)
        found.tokens = tuple(tokens)
        if added := sorted(set(tokens) - set(self.tokens)):
            found._parts = [*self._parts, _Rows(self._layer, added)]
        found._dropped = mx.array(sorted(set(self.tokens) - set(tokens)), mx.int32)
        return found

    def __call__(self, hidden: mx.array) -> mx.array:
        """Compute logits, which are minus infinity for tokens that were not kept.

        Args:
            hidden (mx.array): Hidden states, ``[..., hidden_size]``.

        Returns:
            mx.array: Logits, ``[..., vocab_size]``.
        """
        found = [part(hidden) for part in self._parts]
        shape = (*hidden.shape[:-1], self._layer.weight.shape[0])
        logits = mx.full(shape, -mx.inf, found[0].dtype)
        for part, kept in zip(self._parts, found, strict=True):
            logits[..., part.tokens] = kept
        if self._dropped.size:
            logits[..., self._dropped] = -mx.inf
        return logits


class _Rows:
    """A copy of an output layer's rows for some tokens."""

    def __init__(self, layer: nn.Module, tokens: Sequence[int]):
        self.tokens = mx.array(tokens)
        rows = copy.copy(layer)
        # Every parameter has a row for each token.
        rows.update({name: x[self.tokens] for name, x in layer.parameters().items()})
        self._project = rows.as_linear if isinstance(rows, _TABLES) else rows

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._project(hidden)


class DraftVocabulary:
    """The tokens that may be proposed for the sequences of a model.

    Args:
        model (MTPMixin): The target with its head.
        draft_vocab (int, str or Path): The number of tokens, or a file with their ids.

    Raises:
        SpeculationError: If the file does not list token ids of the model, or if rows
          cannot be taken out of an output layer of this type.
    """

    def __init__(self, model: MTPMixin, draft_vocab: DraftVocab):
        self._layer = model.output_layer
        if type(self._layer) not in _LAYERS:
            raise SpeculationError(
                "Cannot speculate with a part of the vocabulary: the model's output "
                f"layer is a {type(self._layer).__name__}."
            )
        self._draft_vocab = draft_vocab
        self._modified = _modified(draft_vocab)
        self._always: tuple[int, ...] = ()
        vocab_size = self._layer.weight.shape[0]
        if isinstance(draft_vocab, int):
            self._always = _added_tokens(record_of(model).source)
            tokens = choose_tokens(min(draft_vocab, vocab_size), (), self._always)
        else:
            tokens = read_token_ids(draft_vocab, vocab_size)
        self._projection = SubsetProjection(self._layer, tokens)

    @classmethod
    def of(cls, model: MTPMixin, draft_vocab: DraftVocab) -> DraftVocabulary:
        """Return the vocabulary of a model; its rows are copied the first time only.

        Args:
            model (MTPMixin): The target with its head.
            draft_vocab (int, str or Path): The number of tokens, or a file with their
              ids.

        Raises:
            SpeculationError: If there cannot be such a vocabulary.
        """
        record = record_of(model)
        known: DraftVocabulary | None = record.draft_vocabulary
        if known is None or not known._is_still(model, draft_vocab):
            record.draft_vocabulary = known = cls(model, draft_vocab)
        return known

    def projection(self, prompt: Iterable[int]) -> SubsetProjection:
        """Make the output layer to draft with for one sequence.

        Args:
            prompt (Iterable[int]): The tokens of the sequence so far.
        """
        if not isinstance(self._draft_vocab, int):
            return self._projection
        num_tokens = len(self._projection.tokens)
        return self._projection.exchanged(
            choose_tokens(num_tokens, prompt, self._always)
        )

    def _is_still(self, model: MTPMixin, draft_vocab: DraftVocab) -> bool:
        """Tell whether the model, the option and the file of ids are unchanged."""
        return (
            self._layer is model.output_layer
            and self._draft_vocab == draft_vocab
            and self._modified == _modified(draft_vocab)
        )


def _modified(draft_vocab: DraftVocab) -> float | None:
    """Return when a file of token ids was last written, None for a number of tokens."""
    if isinstance(draft_vocab, int):
        return None
    path = Path(draft_vocab).expanduser()
    return path.stat().st_mtime if path.is_file() else None


def choose_tokens(
    num_tokens: int, prompt: Iterable[int], always: Iterable[int]
) -> list[int]:
    """Choose the tokens that are most worth proposing, in ascending order.

    The tokens of ``always`` come first, then the tokens of the prompt by frequency,
    then all others by their ids: a BPE tokenizer numbers tokens in the order in which
    it merged them, the most frequent pair of its training text first.

    Args:
        num_tokens (int): How many tokens to choose.
        prompt (Iterable[int]): The tokens of the sequence so far.
        always (Iterable[int]): Tokens to choose before any other, such as the end of a
          turn.
    """
    of_prompt = (token for token, _ in Counter(prompt).most_common())
    ranked = dict.fromkeys(chain(always, of_prompt, range(num_tokens)))
    return sorted(islice(ranked, num_tokens))


def read_token_ids(file: str | os.PathLike[str], vocab_size: int) -> list[int]:
    """Read the token ids in a file, one a line or a JSON list, in ascending order.

    Args:
        file (str or Path): The file.
        vocab_size (int): The number of tokens that the model has.

    Raises:
        SpeculationError: If the file cannot be read, has no ids, or has anything that
          is not the id of one of the model's tokens.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        tokens = json.loads(text) if text.lstrip()[:1] == "[" else text.split()
        found = sorted({_token_id(token, vocab_size) for token in tokens})
        if not found:
            raise ValueError("it has none")
    except (OSError, ValueError) as exc:
        raise SpeculationError(
            f"Cannot speculate: {path} is no file of token ids, one a line or as a "
            f"JSON list: {exc}."
        ) from exc
    return found


def _token_id(token: Any, vocab_size: int) -> int:
    number = int(token) if isinstance(token, (int, str)) else -1
    if isinstance(token, bool) or not 0 <= number < vocab_size:
        raise ValueError(f"{token!r} is none of the {vocab_size} tokens of the model")
    return number


@functools.cache
def _added_tokens(folder: Path | None) -> tuple[int, ...]:
    """Read the ids of special and other added tokens from a model's tokenizer."""
    if folder is None:
        return ()
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return tuple(token["id"] for token in added)
