"""The tokens that an MTP head may propose, where those are not all.

Most of the cost of a draft is the product with the target's output layer, one row for
each token of the vocabulary. Rows are independent, quantised or not, so a layer of some
of the rows is cheaper and gives those tokens the same logits. It is exact: a token that
cannot be proposed is one that the target adds itself.

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
    """The output layer of a model, over some of its tokens.

    Args:
        layer (nn.Module): The whole output layer, or an embedding used as one.
        tokens (Sequence[int]): Those to keep, in ascending order.
    """

    def __init__(self, layer: nn.Module, tokens: Sequence[int]):
        self._layer = layer
        self._parts = [_Rows(layer, tokens)]
        self._dropped = mx.array([], mx.int32)
        self.tokens = tuple(tokens)

    def exchanged(self, tokens: Sequence[int]) -> SubsetProjection:
        """The projection with other tokens, as many as before.

        The rows that are copied already are shared; only those of new tokens are
        copied.

        Args:
            tokens (Sequence[int]): Those to keep, in ascending order.
        """
        found = copy.copy(self)
        found.tokens = tuple(tokens)
        if added := sorted(set(tokens) - set(self.tokens)):
            found._parts = [*self._parts, _Rows(self._layer, added)]
        found._dropped = mx.array(sorted(set(self.tokens) - set(tokens)), mx.int32)
        return found

    def __call__(self, hidden: mx.array) -> mx.array:
        """Logits of states, minus infinity for tokens that were not kept.

        Args:
            hidden (mx.array): ``[..., hidden_size]``.

        Returns:
            mx.array: ``[..., vocab_size]``.
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
    """A copy of the rows that an output layer has for some tokens."""

    def __init__(self, layer: nn.Module, tokens: Sequence[int]):
        self.tokens = mx.array(tokens)
        rows = copy.copy(layer)
        # Every parameter has a row for each token.
        rows.update({name: x[self.tokens] for name, x in layer.parameters().items()})
        self._project = rows.as_linear if isinstance(rows, _TABLES) else rows

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._project(hidden)


class DraftVocabulary:
    """Which tokens are proposed for the sequences of a model.

    Args:
        model (MTPMixin): The target with its head.
        draft_vocab (int or path): How many, or a file with their ids.

    Raises:
        SpeculationError: If the file is not such a file, or the output layer is one of
          which no rows can be taken.
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
        """The vocabulary of a model, whose rows are copied the first time only."""
        record = record_of(model)
        known: DraftVocabulary | None = record.draft_vocabulary
        if known is None or not known._is_still(model, draft_vocab):
            record.draft_vocabulary = known = cls(model, draft_vocab)
        return known

    def projection(self, prompt: Iterable[int]) -> SubsetProjection:
        """The output layer to draft with.

        Args:
            prompt (Iterable[int]): Tokens of the sequence so far.
        """
        if not isinstance(self._draft_vocab, int):
            return self._projection
        num_tokens = len(self._projection.tokens)
        return self._projection.exchanged(
            choose_tokens(num_tokens, prompt, self._always)
        )

    def _is_still(self, model: MTPMixin, draft_vocab: DraftVocab) -> bool:
        """Whether this is what a model and a wish for tokens still ask for."""
        return (
            self._layer is model.output_layer
            and self._draft_vocab == draft_vocab
            and self._modified == _modified(draft_vocab)
        )


def _modified(draft_vocab: DraftVocab) -> float | None:
    """When a file of token ids was last written; None for anything else."""
    if isinstance(draft_vocab, int):
        return None
    path = Path(draft_vocab).expanduser()
    return path.stat().st_mtime if path.is_file() else None


def choose_tokens(
    num_tokens: int, prompt: Iterable[int], always: Iterable[int]
) -> list[int]:
    """The tokens that are most worth proposing, in ascending order.

    Those of the tokenizer that stand outside its vocabulary, like the end of a turn,
    come first, then those of the prompt, by frequency, then all others by their ids. A
    BPE tokenizer numbers tokens in the order in which it merged them, the most frequent
    pair of its training text first.

    Args:
        num_tokens (int): How many to choose.
        prompt (Iterable[int]): Tokens of the sequence so far.
        always (Iterable[int]): To be chosen before any other.
    """
    of_prompt = (token for token, _ in Counter(prompt).most_common())
    ranked = dict.fromkeys(chain(always, of_prompt, range(num_tokens)))
    return sorted(islice(ranked, num_tokens))


def read_token_ids(file: str | os.PathLike[str], vocab_size: int) -> list[int]:
    """The token ids in a file, one a line or as a JSON list, in ascending order.

    Raises:
        SpeculationError: If the file holds anything else, or none that the model has.
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
    """Ids that a model's tokenizer has for special and other added tokens."""
    if folder is None:
        return ()
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return tuple(token["id"] for token in added)
