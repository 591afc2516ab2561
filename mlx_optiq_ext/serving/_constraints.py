"""Turns what is asked of a reply into a logits processor.

A grammar is compiled in the thread of its request, which may take a while and keeps
nobody else waiting. The generation thread then starts on it once it has the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..grammars import ConstraintProcessor, ReplyRules, Shape, Tool
from ._arguments import Arguments
from ._conversation import tool_name
from ._request import Request
from ._structure import explained

if TYPE_CHECKING:
    from ._exchange import Exchange


def shape_of(request: Request) -> Shape:
    """What is asked of the reply to a request."""
    has_rules = request.must_call or request.strict_tools or request.answer is not None
    tools = [
        Tool(
            tool_name(tool),
            tool["function"].get("parameters") or {},
            tool_name(tool) in request.strict_tools,
        )
        for tool in request.tools or []
        if has_rules
    ]
    return Shape(
        request.answer,
        tuple(tools),
        request.must_call,
        request.one_call,
        request.max_thinking_tokens,
    )


def _path(request: Request) -> str:
    """The field that asks for the grammar of a reply."""
    if request.answer is not None and not request.must_call:
        return request.answer_path
    return "tool_choice" if request.must_call else "tools"


def compile_rules(exchange: Exchange, request: Request, arguments: Arguments) -> None:
    """Compile the grammars of a request, if it has some.

    Raises:
        APIError: 400, if one is malformed, not supported or too complex.
    """
    shape = shape_of(request)
    if not shape.needs_grammar:
        return
    tokenizer = tokenizer_for(exchange, arguments)
    with explained(_path(request)):
        arguments.rules = ReplyRules(shape, tokenizer)


def begin_constraint(
    tokenizer: Any, request: Request, arguments: Arguments, prompt: list[int]
) -> None:
    """Say where in the prompt's reply its grammar begins.

    Args:
        tokenizer (TokenizerWrapper): Of the model that is going to reply.
        request (Request): What is asked of the reply.
        arguments (Arguments): Its logits processors are made of them.
        prompt (list[int]): The tokens of the prompt.
    """
    shape, rules = shape_of(request), arguments.rules
    if shape == Shape() or request.counts_only:
        return
    if rules is None or rules.tokenizer is not tokenizer:
        # There is another model now than the one that it was compiled for.
        with explained(_path(request)):
            rules = ReplyRules(shape, tokenizer)
    is_chat = request.request_type == "chat"
    arguments.begin = lambda: rules.begin_after(prompt) if is_chat else rules.begin()


def constraints(arguments: Arguments) -> list[ConstraintProcessor]:
    """The logits processors for one reply that has to look like something."""
    begin = getattr(arguments, "begin", None)
    return [] if begin is None else [ConstraintProcessor(begin())]


def tokenizer_for(exchange: Exchange, arguments: Arguments) -> Any:
    """The tokenizer of a request's model, which is loaded if it is not.

    Raises:
        APIError: If it cannot be loaded.
    """
    from ._generation import loaded_tokenizer, read_prompt

    provider = exchange.generator.model_provider
    if (tokenizer := loaded_tokenizer(provider, arguments)) is not None:
        return tokenizer
    # Only the generation thread may load a model.
    probe = Request("text", prompt="a", counts_only=True)
    read_prompt(exchange, probe, arguments)
    return probe.tokenizer
