"""Log probabilities of tokens, as OpenAI's APIs write them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._events import Token

LEAST_LOGPROB = -9999.0  # JSON has no infinity, which is that of a forbidden token.


def spelled(token: Token, tokenizer: Any, source: str | None) -> Token:
    """A token with its own text and those of the alternatives, likely ones first.

    Args:
        token (Token): The token without its texts.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        source (str, optional): The drafter that proposed the token.
    """
    ranked = sorted(
        token.top, key=lambda each: (-each["logprob"], each["id"] != token.id)
    )
    return dataclasses.replace(
        token,
        top=[each | {"token": tokenizer.decode([each["id"]])} for each in ranked],
        spelling=tokenizer.decode([token.id]),
        source=source,
    )


def logprob_entry(token: Token) -> dict[str, Any]:
    """What a reply says of a token."""
    entry = _entry(token.id, token.spelling, token.logprob)
    entry["top_logprobs"] = [
        _entry(each["id"], each["token"], each["logprob"]) for each in token.top
    ]
    return entry


def _entry(token_id: int, text: str, logprob: float) -> dict[str, Any]:
    # Part of a character has no spelling.
    encoded = None if "\ufffd" in text else list(text.encode())
    return {
        "id": token_id,
        "token": text,
        "bytes": encoded,
        "logprob": max(logprob, LEAST_LOGPROB),
    }
