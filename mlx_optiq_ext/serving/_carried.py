"""What a request carries through mlx-lm's server beside mlx-lm's own arguments."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

from ..decoding import SpeculationStats


@dataclass
class Carried:
    """What this package has to know of one request.

    Args:
        given (Collection[str], optional): The sampling fields that somebody asked for;
            None where nothing is recommended to those that did not.
        reply_queue (Queue, optional): Where the reply goes, once the request was
            taken from the line.
        stats (SpeculationStats, optional): Counts what speculation does; None while
            the request is not decoded speculatively.
    """

    given: Collection[str] | None = None
    reply_queue: Queue[Any] | None = field(default=None, repr=False)
    stats: SpeculationStats | None = None


def carried_by(arguments: Any) -> Carried:
    """What a request carries.

    Args:
        arguments (GenerationArguments): Of the request.
    """
    found: Carried | None = getattr(arguments, "carried", None)
    if found is None:
        found = arguments.carried = Carried()
    return found
