"""The number of draft tokens: its limits and its check."""

from __future__ import annotations

from typing import Any, Literal

MAX_DRAFT_TOKENS = 8

NumDraftTokens = int | Literal["auto"]


class AutoNumber(int):
    """Stands for ``"auto"`` where mlx-lm insists on a number."""


def check_num_draft_tokens(num_draft_tokens: Any) -> None:
    """Raise ValueError unless this is a whole number from 1 to 8 or ``"auto"``."""
    if isinstance(num_draft_tokens, str) and num_draft_tokens == "auto":
        return
    is_int = isinstance(num_draft_tokens, int) and not isinstance(
        num_draft_tokens, bool
    )
    if not is_int or not 1 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise ValueError(
            "num_draft_tokens must be 'auto' or a whole number from 1 to "
            f"{MAX_DRAFT_TOKENS}, got {num_draft_tokens!r}."
        )
