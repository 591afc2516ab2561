"""What a model's reply consists of, whichever API it goes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

EndReason = Literal["stop", "stop_sequence", "length", "context"]


@dataclass(frozen=True)
class Thought:
    """A piece of reasoning."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of a tool that is being written. Its pieces follow, then the `Call`."""

    name: str


@dataclass(frozen=True)
class CallPiece:
    """A piece of the arguments, as JSON."""

    text: str


@dataclass(frozen=True)
class Call:
    """A whole call of a tool; a `CallStart` and pieces of it may have come before."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class End:
    """Why a reply is over.

    Args:
        reason (str): "stop": the model ended it; "stop_sequence": a stop sequence
          did; "length": ``max_tokens`` are reached; "context": no position is left.
        stop_sequence (str, optional): The stop sequence that occurred.
    """

    reason: EndReason
    stop_sequence: str | None = None


Event = Thought | Text | CallStart | CallPiece | Call | End


@dataclass
class Usage:
    """Numbers of tokens, counted while a reply is generated."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_thinking_tokens: int = 0
