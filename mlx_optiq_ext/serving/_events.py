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
        name (str): The name of the tool.
        id (str, optional): The model's own id for the call, where its format has one.
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
        name (str): The name of the tool.
        arguments (dict): The object that the pieces add up to.
        id (str, optional): The id that the `CallStart` has.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Token:
    """A token that was generated; what is known of its text comes after it.

    Args:
        id (int): The token's number in the vocabulary.
        logprob (float): The natural logarithm of its probability.
        top (Sequence[dict]): mlx-lm's ``id``, ``token`` and ``logprob`` of the most
          probable tokens in its place.
        text (str): The text that the token adds to the reply.
        source (str, optional): The drafter that proposed it, None if none did.
        spelling (str): The token's own text.
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
        num_prompt_tokens (int): Tokens of the prompt.
        num_cached_tokens (int): Tokens of the prompt that were in the cache.
        num_output_tokens (int): Tokens generated, in all choices together.
        num_thinking_tokens (int): Tokens generated that belong to thoughts.
        stats (list): What speculation did for each choice that has ended; empty where
          the model is decoded plainly.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_thinking_tokens: int = 0
    stats: list[SpeculationStats] = field(default_factory=list)
