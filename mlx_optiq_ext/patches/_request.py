"""What a call of mlx-lm asks for; cheap, for every call passes here."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .._options import NumDraftTokens

DRAFT_MODEL_POSITION = 4  # of stream_generate's positional arguments


@dataclass
class Request:
    """What a command line asks for, or a server on behalf of one of its requests.

    Args:
        mtp, draft, num_draft_tokens, draft_vocab: As the arguments of ``generate``.
        stats (SpeculationStats, optional): Counts what happens.
    """

    mtp: str | bool | None = None
    draft: Any = None
    num_draft_tokens: NumDraftTokens | None = None
    draft_vocab: int | str | None = None
    stats: Any = None

    @property
    def is_speculative(self) -> bool:
        return bool(self.mtp) or self.draft is not None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``generate`` that mean the same."""
        return {
            "mtp": self.mtp,
            "draft": self.draft,
            "num_draft_tokens": self.num_draft_tokens,
            "draft_vocab": self.draft_vocab,
        }


# Set where what mlx-lm calls itself has no argument that could carry the request.
current: ContextVar[Request | None] = ContextVar("current", default=None)


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether neither the arguments nor the command line mention speculation."""
    request = current.get()
    return (
        "mtp" not in kwargs
        and "draft" not in kwargs
        and "draft_vocab" not in kwargs
        and kwargs.get("draft_model") is None
        and len(args) <= DRAFT_MODEL_POSITION
        and (request is None or not request.is_speculative)
    )
