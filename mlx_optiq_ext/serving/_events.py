"""What a model's reply consists of, whichever API it goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..decoding import SpeculationStats

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
    """A call of a tool that is being written. Its pieces follow, then the `Call`.

    Args:
        name (str): Of the tool.
        id (str, optional): What the model calls the call, where its format has that.
    """

    name: str
    id: str | None = None


@dataclass(frozen=True)
class CallPiece:
    """A piece of the arguments, as JSON."""

    text: str


@dataclass(frozen=True)
class Call:
    """The end of a call of a tool: its `CallStart` and its pieces came before.

    Args:
        name (str): Of the tool.
        arguments (dict): What the pieces add up to.
        id (str, optional): As in the `CallStart`.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Token:
    """A token that was generated; what is known of its text comes after it.

    Args:
        id (int): Of the token.
        logprob (float): Its natural logarithm of the probability.
        top (Sequence[dict]): mlx-lm's ``id``, ``token`` and ``logprob`` of others.
        text (str): What it adds to the text that was generated.
        source (str, optional): What drafted it, None if the model itself wrote it.
        spelling (str): Its own text.
    """

    id: int
    logprob: float
    top: Sequence[dict[str, Any]] = ()
    text: str = ""
    source: str | None = None
    spelling: str = ""


@dataclass(frozen=True)
class Choice:
    """The events that follow belong to the reply with this index."""

    index: int


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


Event = Thought | Text | CallStart | CallPiece | Call | Token | Choice | End


@dataclass
class Usage:
    """Numbers of tokens, counted while a reply is generated.

    Args:
        num_prompt_tokens (int): Of the prompt.
        num_cached_tokens (int): Those of it that were in the cache.
        num_output_tokens (int): Generated, in all choices together.
        num_thinking_tokens (int): Those of them that are thoughts.
        stats (list): What speculation did for each choice that has ended; empty where
          the model is decoded plainly.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_thinking_tokens: int = 0
    stats: list[SpeculationStats] = field(default_factory=list)
