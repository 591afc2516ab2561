"""Reads what a call of mlx-lm asks for, cheaply because every call passes here."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .._options import NumDraftTokens

# The index of draft_model among the positional arguments of stream_generate.
DRAFT_MODEL_POSITION = 4


@dataclass
class Request:
    """The speculation that a command line, or a request to a server, asks for.

    Args:
        mtp (bool or str, optional): True for the model's own head, or a place with one.
        draft (Any): The drafter, or the folder or Hub id of one.
        num_draft_tokens (int or str, optional): The number of tokens to draft in a
          round, from 1 to 8, or ``"auto"``.
        draft_vocab (int or str, optional): The number of tokens that the head may
          propose, or a file with their ids.
        prompt_lookup (bool): Whether what stands in the context is copied as well.
        stats (SpeculationStats, optional): The counts to add to.
        seed (int, optional): The seed of what is sampled.
        batch (BatchSpeculation, optional): How the sequences of the batch generator
          that is made next are decoded.
    """

    mtp: str | bool | None = None
    draft: Any = None
    num_draft_tokens: NumDraftTokens | None = None
    draft_vocab: int | str | None = None
    prompt_lookup: bool = False
    stats: Any = None
    seed: int | None = None
    batch: Any = None

    @property
    def is_speculative(self) -> bool:
        return bool(self.mtp) or self.draft is not None or self.prompt_lookup

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``generate`` that ask for the same speculation."""
        return {
            "mtp": self.mtp,
            "draft": self.draft,
            "num_draft_tokens": self.num_draft_tokens,
            "draft_vocab": self.draft_vocab,
            "prompt_lookup": self.prompt_lookup,
        }


# This carries the request where functions of mlx-lm have no argument that could do so.
current: ContextVar[Request | None] = ContextVar("current", default=None)


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether neither the arguments nor the command line mention speculation.

    Args:
        args (tuple): The positional arguments of ``generate`` or ``stream_generate``.
        kwargs (Mapping[str, Any]): The keyword arguments of that call.
    """
    request = current.get()
    return (
        "mtp" not in kwargs
        and "draft" not in kwargs
        and "draft_vocab" not in kwargs
        and "prompt_lookup" not in kwargs
        and kwargs.get("draft_model") is None
        and len(args) <= DRAFT_MODEL_POSITION
        and (request is None or not request.is_speculative)
    )
