"""Compiles what is asked of a reply for the tokenizer of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._errors import GrammarError
from ._calls import CallGrammar, Tool
from ._constraint import ReplyConstraint, Rules
from ._lark import LarkWriter, alternatives
from ._matcher import Grammar
from ._schemas import place_of_error
from ._sources import Source, together
from ._vocabulary import Vocabulary

# The end of a prompt is that of the template if it is within so many tokens.
TAIL = 11


@dataclass(frozen=True)
class Shape:
    """What is asked of a reply, whichever model writes it.

    Args:
        answer (Source, optional): What the answer has to follow.
        tools (tuple[Tool, ...]): Those that may be called, by calls that follow their
            schemas: in place of an answer with a grammar, or in the middle of one that
            has none.
        must_call (bool): Whether the answer has to be a call.
        one_call (bool): Whether it may not be several.
        max_thinking_tokens (int, optional): Tokens that a thought may have, after which
            its end is forced.
    """

    answer: Source | None = None
    tools: tuple[Tool, ...] = ()
    must_call: bool = False
    one_call: bool = False
    max_thinking_tokens: int | None = None

    @property
    def needs_grammar(self) -> bool:
        """Whether llguidance is needed for it."""
        return self.answer is not None or len(self.tools) > 0


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
        self.tokenizer = tokenizer
        self._rules = Rules(
            vocabulary,
            _answer(shape, tokenizer, vocabulary),
            _call(shape, tokenizer, vocabulary),
            call_start=tuple(tokenizer.tool_call_start_tokens or ()),
            max_thinking_tokens=shape.max_thinking_tokens,
            think_start=tuple(tokenizer.think_start_tokens or ()),
            think_end=tuple(tokenizer.think_end_tokens or ()),
            separator=_single_tokens(tokenizer, "\n", "\n\n"),
        )

    def begin_after(self, prompt: str | Sequence[int]) -> ReplyConstraint:
        """Start on the reply to a prompt, which may leave a thought open.

        Args:
            prompt (str or Sequence[int]): The prompt, or its tokens.
        """
        tokenizer = self.tokenizer
        if not tokenizer.has_thinking:
            return self.begin()
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special_tokens=False)
        tokens = list(prompt)
        start, end = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(
            tokens
        )
        # A template that leaves out the thought closes one at the end of the prompt.
        has_thought = end >= 0 and end >= len(tokens) - TAIL
        return self.begin(in_thought=start > end, may_think=not has_thought)

    def begin(
        self, *, in_thought: bool = False, may_think: bool = False
    ) -> ReplyConstraint:
        """Start on a reply.

        Args:
            in_thought (bool): Whether it begins within a thought.
            may_think (bool): Whether it may begin with one.
        """
        return ReplyConstraint(self._rules, in_thought=in_thought, may_think=may_think)


def _answer(shape: Shape, tokenizer: Any, vocabulary: Vocabulary) -> Grammar | None:
    """The grammar of an answer, None if there is none."""
    if shape.answer is not None and not shape.tools:
        return compiled(shape.answer, vocabulary)
    if shape.answer is None and not shape.must_call:
        return None

    def start(writer: LarkWriter) -> str:
        calls = CallGrammar(shape.tools, tokenizer, writer).calls(shape.one_call)
        if shape.answer is None or shape.must_call:
            return calls
        compiled(shape.answer, vocabulary)
        return alternatives([writer.add(shape.answer.named("")), calls])

    return _compiled_calls(shape, tokenizer, vocabulary, start)


def _call(shape: Shape, tokenizer: Any, vocabulary: Vocabulary) -> Grammar | None:
    """The grammar of a call in the middle of an answer that has none."""
    if not shape.tools or shape.must_call or shape.answer is not None:
        return None

    def start(writer: LarkWriter) -> str:
        return CallGrammar(shape.tools, tokenizer, writer).behind_marker

    return _compiled_calls(shape, tokenizer, vocabulary, start)


def _compiled_calls(
    shape: Shape,
    tokenizer: Any,
    vocabulary: Vocabulary,
    start: Callable[[LarkWriter], str],
) -> Grammar:
    """Compile a grammar that has calls in it.

    Raises:
        GrammarError: If it cannot be; the path begins with the name of the tool whose
          schema is the reason.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    writer = LarkWriter(vocabulary, encode)
    grammar = start(writer)
    for tool in shape.tools:
        if tool.is_strict:
            _check_tool(tool, vocabulary)
    try:
        return Grammar(writer.text(grammar), vocabulary)
    except GrammarError:
        for tool in shape.tools:
            _check_tool(tool, vocabulary)
        raise


def _check_tool(tool: Tool, vocabulary: Vocabulary) -> None:
    """Compile the schema of a tool by itself.

    Raises:
        GrammarError: If it cannot be; the path begins with the tool's name.
    """
    try:
        compiled(Source("json_schema", tool.schema, tool.is_strict), vocabulary)
    except GrammarError as error:
        path = ".".join(filter(None, [tool.name, error.path]))
        raise GrammarError(error.reason, path) from error


def compiled(source: Source, vocabulary: Vocabulary) -> Grammar:
    """Compile what a user wrote.

    Raises:
        GrammarError: If it is malformed, not supported or too complex.
    """

    def compile_it(source: Source) -> Grammar:
        return Grammar(together("start: @answer", [source.named("answer")]), vocabulary)

    def error_of(schema: Any) -> str:
        try:
            compile_it(replace(source, content=schema))
        except GrammarError as error:
            return error.reason
        return ""

    try:
        return compile_it(source)
    except GrammarError as error:
        if source.kind != "json_schema" or not isinstance(source.content, dict):
            raise
        path = place_of_error(source.content, error_of)
        raise GrammarError(error.reason, path) from error


def _single_tokens(tokenizer: Any, *texts: str) -> tuple[int, ...]:
    """Those of some texts that are one token."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return tuple(tokens[0] for tokens in encoded if len(tokens) == 1)
