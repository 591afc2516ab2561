"""What an exception of mlx-lm's response generator means for the client."""

from __future__ import annotations

from ._errors import APIError, before_generation, during_generation
from ._exchange import Exchange


def explain(exchange: Exchange, exc: BaseException) -> APIError:
    """The error to answer with."""
    is_before = not any(each.inbox.context for each in exchange.sequences)
    error = before_generation(exc) if is_before else during_generation(exc)
    # The mistakes of a caller are the caller's, whatever state the server is in.
    if error.status >= 500 and not exchange.generator.generation_available():
        return APIError(503, "the generation thread died", code="server_error")
    return error
