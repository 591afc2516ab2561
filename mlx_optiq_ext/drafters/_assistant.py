"""Drafting with the assistant of a Gemma-4 model.

The assistant has no cache: it attends to keys and values of the target. Those of
rejected tokens are rolled back before it drafts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._checkpoints import Source
from .._errors import SpeculationError
from .._record import record_of
from ..assistants import Assistant, load_assistant
from ..mixins import SharedKVMixin, attach_shared_kv
from ._batched import BatchDraftSession
from ._protocol import Proposal

# The query of every draft step has this position, counted from the last token's, whose
# keys and values the target has yet to compute. Hugging Face and Google use 0; vLLM,
# SGLang and mlx-vlm use -1, the last position that has keys and values.
QUERY_OFFSET = 0


class GemmaAssistantDrafter:
    """Drafts with the assistant that was trained for a Gemma-4 model.

    Args:
        assistant (Assistant): The loaded assistant.
        name (str): The name of the assistant in errors.
        query_offset (int): The position of the query, counted from the last token's:
          ``0`` or ``-1``.
        target (nn.Module, optional): The model to draft for, with shared keys and
          values. ``bind`` sets it.

    Raises:
        ValueError: If ``query_offset`` is neither 0 nor -1.
    """

    name = "assistant"
    reads_hidden_states = True
    computes_drafts = True

    def __init__(
        self,
        assistant: Assistant,
        name: str = "the assistant",
        *,
        query_offset: int = QUERY_OFFSET,
        target: SharedKVMixin | None = None,
    ):
        if query_offset not in (0, -1):
            raise ValueError(f"query_offset must be 0 or -1, got {query_offset!r}.")
        self._assistant = assistant
        self._name = name
        self._query_offset = query_offset
        self._target = target

    @classmethod
    def from_pretrained(
        cls, source: Source, *, query_offset: int = QUERY_OFFSET
    ) -> GemmaAssistantDrafter:
        """Load a ``gemma4_assistant`` or ``gemma4_unified_assistant`` checkpoint.

        Args:
            source (str or Path): A folder or a Hub id.
            query_offset (int): The position of the query, counted from the last
              token's: ``0`` or ``-1``. It changes nothing but acceptance.

        Raises:
            ValueError: If ``query_offset`` is neither 0 nor -1.
            SpeculationError: If there is no assistant, or a part of it is missing.
        """
        return cls(load_assistant(source), str(source), query_offset=query_offset)

    def bind(self, model: nn.Module) -> GemmaAssistantDrafter:
        """Make a drafter for a model with the same assistant.

        Args:
            model (nn.Module): A Gemma-4 model that mlx-lm loaded. Its class becomes one
              that shares keys and values; all else stays as it is.

        Raises:
            SpeculationError: If the assistant was made for another model.
        """
        attach_shared_kv(model)
        if differences := _differences(self._assistant, model):
            target = record_of(model).source or type(model).__module__
            raise SpeculationError(
                f"Cannot speculate: the assistant {self._name} was made for another "
                f"model than {target}: {'; '.join(differences)}."
            )
        return GemmaAssistantDrafter(
            self._assistant,
            self._name,
            query_offset=self._query_offset,
            target=model,
        )

    def make_cache(self) -> list[Any]:
        return []

    def open_batch(self) -> BatchDraftSession | None:
        # The assistant reads the target's entries, those of one sequence.
        return None

    def open(
        self,
        prompt_cache: list[Any],
        num_target_entries: int,
        num_tokens: int,
        tokens: Sequence[int] = (),
    ) -> AssistantSession:
        if self._target is None:
            raise SpeculationError(
                f"Cannot speculate: the assistant {self._name} has no model yet, "
                "expected drafter.bind(model)."
            )
        return AssistantSession(
            self._assistant,
            self._target,
            prompt_cache,
            num_target_entries,
            num_tokens + self._query_offset,
        )


class AssistantSession:
    """The assistant at work on one sequence."""

    num_put_off = 0
    entries: Sequence[Any] = ()

    def __init__(
        self,
        assistant: Assistant,
        target: SharedKVMixin,
        prompt_cache: list[Any],
        num_entries: int,
        next_position: int,
    ):
        self._assistant = assistant
        self._target = target
        # Entries are replaced in this list when they are quantised.
        self._prompt_cache = prompt_cache
        self._num_entries = num_entries
        # This is the query's position for the token after all that were seen.
        self._next_position = next_position

    @property
    def last_state(self) -> None:
        return None

    def prefill(
        self,
        tokens: mx.array,
        states: mx.array | None,
        embeddings: mx.array | None = None,
    ) -> None:
        assert states is not None
        self._next_position += states.shape[1]

    def draft(
        self,
        tokens: mx.array,
        states: mx.array | None,
        num_draft_tokens: int,
        proposal: Proposal,
    ) -> None:
        self._next_position += tokens.size
        if states is None or not num_draft_tokens:
            return
        entries = self._prompt_cache[: self._num_entries]
        shared_kv = self._assistant.visible(self._target.shared_kv(entries))
        position = self._next_position - 1
        token, hidden = tokens[-1:], states[:, -1:]
        for _ in range(num_draft_tokens):
            embedding = self._target.embed(token)[None]
            logits, hidden = self._assistant(embedding, hidden, shared_kv, position)
            proposal.add(logits[:, -1])
            token = proposal.tokens[-1]

    def catch_up(self) -> None:
        pass

    def close(self, num_tokens: int, last_state: mx.array | None) -> None:
        pass


def _differences(assistant: Assistant, target: SharedKVMixin) -> list[str]:
    """List in what an assistant and a model do not fit each other."""
    own, text = assistant.text_args, target.text_model.args
    donors = {kind: target.text_model.layers[i] for kind, i in target.donors.items()}
    sizes = [
        ("states of size", assistant.args.backbone_hidden_size, text.hidden_size),
        ("tokens to the number of", own.vocab_size, text.vocab_size),
    ]
    kinds = {layer.layer_type: layer.self_attn for layer in assistant.layers}
    for kind, attention in kinds.items():
        donor = donors[kind].self_attn.head_dim if kind in donors else None
        sizes.append((f"{kind} heads of size", attention.head_dim, donor))
    return [
        f"it expects {what} {expected}, the model has {found}"
        for what, expected, found in sizes
        if expected != found
    ]
