"""Whether a call of mlx-lm asks for speculation; cheap, for every call passes here."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .._options import NumDraftTokens

DRAFT_MODEL_POSITION = 4  # of stream_generate's positional arguments


@dataclass
class CommandLineRequest:
    """What the command line asked for, or a server on behalf of a request.

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


command_line: ContextVar[CommandLineRequest | None] = ContextVar(
    "command_line", default=None
)


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether neither the arguments nor the command line mention speculation."""
    request = command_line.get()
    return (
        "mtp" not in kwargs
        and "draft" not in kwargs
        and "draft_vocab" not in kwargs
        and kwargs.get("draft_model") is None
        and len(args) <= DRAFT_MODEL_POSITION
        and (request is None or not request.is_speculative)
    )
