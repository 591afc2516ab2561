"""The options of speculation, with their limits and checks."""

from __future__ import annotations

import os
from typing import Any, Literal

DraftVocab = int | str | os.PathLike[str]

MAX_DRAFT_TOKENS = 8
# Bits that an MTP head may be kept in; 0 leaves it as it is stored.
MTP_BITS = (0, 2, 3, 4, 5, 6, 8)
API_KEY_VARIABLE = "MLX_OPTIQ_EXT_API_KEY"  # of the environment of a server

NumDraftTokens = int | Literal["auto"]


class _Auto(int):
    """A whole number that is recognised by its identity and not by its value."""


# This stands for "auto" where mlx-lm insists on a whole number of at least 1.
AUTO_AS_NUMBER = _Auto(1)


def check_num_draft_tokens(num_draft_tokens: Any) -> None:
    """Check a number of draft tokens in a round.

    Args:
        num_draft_tokens (Any): What the caller passed.

    Raises:
        ValueError: If it is neither a whole number from 1 to 8 nor ``"auto"``.
    """
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


def check_mtp_bits(mtp_bits: Any) -> None:
    """Check the bits that an MTP head is to be kept in.

    Args:
        mtp_bits (Any): What the caller passed.

    Raises:
        ValueError: If MLX has no kernels for so many.
    """
    if isinstance(mtp_bits, bool) or mtp_bits not in MTP_BITS:
        expected = ", ".join(map(str, MTP_BITS[:-1]))
        raise ValueError(
            f"mtp_bits must be {expected} or {MTP_BITS[-1]}, got {mtp_bits!r}."
        )


def check_draft_vocab(draft_vocab: Any) -> None:
    """Check a limit on the vocabulary that drafts are made from.

    Args:
        draft_vocab (Any): What the caller passed.

    Raises:
        ValueError: If it is neither a positive whole number nor a path.
    """
    is_int = isinstance(draft_vocab, int) and not isinstance(draft_vocab, bool)
    is_path = isinstance(draft_vocab, (str, os.PathLike)) and os.fspath(draft_vocab)
    if not is_path and not (is_int and draft_vocab > 0):
        raise ValueError(
            "draft_vocab must be a positive whole number or a file of token ids, got "
            f"{draft_vocab!r}."
        )
