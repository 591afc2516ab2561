"""Compiles what is asked of a reply for the tokenizer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._constraint import ReplyConstraint, Rules
from ._matcher import Grammar
from ._sources import Source, together
from ._vocabulary import Vocabulary


@dataclass(frozen=True)
class Shape:
    """What is asked of a reply, whichever model writes it.

    Args:
        answer (Source, optional): What the answer has to follow.
        max_thinking_tokens (int, optional): Tokens that a thought may have, after which
            its end is forced.
    """

    answer: Source | None = None
    max_thinking_tokens: int | None = None


class ReplyRules:
    """What is asked of a reply, compiled for a tokenizer. It can be used many times.

    Args:
        shape (Shape): What is asked.
        tokenizer (TokenizerWrapper): mlx-lm's, of the model.

    Raises:
        GrammarError: If a grammar is malformed, not supported or too complex.
        ImportError: If llguidance is not installed.
    """

    def __init__(self, shape: Shape, tokenizer: Any):
        vocabulary = Vocabulary.of(tokenizer)
        answer = shape.answer
        grammar = None
        if answer is not None:
            named = answer.named("answer")
            grammar = Grammar(together("start: @answer", [named]), vocabulary)
        self.tokenizer = tokenizer
        self._rules = Rules(
            vocabulary,
            grammar,
            max_thinking_tokens=shape.max_thinking_tokens,
            think_start=tuple(tokenizer.think_start_tokens or ()),
            think_end=tuple(tokenizer.think_end_tokens or ()),
            separator=_single_tokens(tokenizer, "\n", "\n\n"),
        )

    def begin(
        self, *, in_thought: bool = False, may_think: bool = False
    ) -> ReplyConstraint:
        """Start on a reply.

        Args:
            in_thought (bool): Whether it begins within a thought.
            may_think (bool): Whether it may begin with one.
        """
        return ReplyConstraint(
            self._rules, in_thought=in_thought, may_think=may_think
        )


def _single_tokens(tokenizer: Any, *texts: str) -> tuple[int, ...]:
    """Those of some texts that are one token."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return tuple(tokens[0] for tokens in encoded if len(tokens) == 1)
