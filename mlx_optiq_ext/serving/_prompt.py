"""Turns a request into a prompt: what its template takes, and how the reply begins."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from mlx_lm import server

from ._arguments import Arguments, check_generation
from ._context import context_size
from ._conversation import Conversation, Message
from ._errors import bad_request, context_overflow, is_template_error
from ._images import reading_images
from ._reading import ReplyFormat
from ._request import Request
from ._sampling import drop_idle_top_k, recommend
from ._speculation import check_draft_tokens, speculation_of

Tokenized = tuple[Any, ...]
Tokenize = Callable[..., Tokenized]


class Segments(list[list[int]]):
    """The parts of a prompt, which mlx-lm hands to the batch as they are.

    Args:
        segments (list[list[int]]): The parts.
        arguments (Arguments): The arguments of the request with this prompt.
    """

    def __init__(self, segments: list[list[int]], arguments: Any):
        super().__init__(segments)
        self.arguments = arguments


def make_prompt(
    tokenize: Tokenize,
    provider: server.ModelProvider,
    tokenizer: Any,
    request: Request,
    arguments: Arguments,
) -> Tokenized:
    """The prompt of a request, and where the reply to it starts.

    Args:
        tokenize (Callable): mlx-lm's ``ResponseGenerator._tokenize``.
        provider (ModelProvider): The provider of the model.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        request (Request): The state of the reply is left with it.
        arguments (Arguments): Its arguments; what is left of the context
          limits their ``max_tokens``.

    Returns:
        tuple: What mlx-lm's function returns.

    Raises:
        APIError: 400, if the model cannot do what is asked, or if the prompt is longer
          than its context.
    """
    _check_request(provider, tokenizer, request)
    recommend(arguments, provider.model)
    drop_idle_top_k(arguments, request.body, len(tokenizer))
    prompt, segments, kinds, state, *rest = _begin_reply(
        tokenizer, request, _tokenize(tokenize, tokenizer, request, arguments)
    )
    is_whole = kinds == ["assistant"] and request.request_type == "chat"
    if is_whole and len(prompt) > 1 and not request.has_images:
        segments, kinds = _split(tokenizer, prompt)
    request.tokenizer, request.initial_state = tokenizer, state
    if request.request_type == "chat":
        request.format = ReplyFormat.of(tokenizer)
    if not request.counts_only:
        _limit(provider.model, request, arguments, len(prompt))
        _check_arguments(provider.model, tokenizer, arguments, prompt)
    return (prompt, Segments(segments, arguments), kinds, state, *rest)


def _tokenize(
    tokenize: Tokenize, tokenizer: Any, request: Request, arguments: Any
) -> Tokenized:
    if isinstance(request.prompt, list):
        _check_tokens(request.prompt, len(tokenizer))
        # mlx-lm encodes texts only; it says where a reply without messages starts.
        empty = dataclasses.replace(request, prompt="")
        _, _, kinds, *rest = tokenize(tokenizer, empty, arguments)
        return (request.prompt, [request.prompt], kinds, *rest)
    messages = _renamed(request.messages, tokenizer)
    images = reading_images() if request.has_images else contextlib.nullcontext()
    with images:
        try:
            return tokenize(tokenizer, _with(request, messages), arguments)
        except Exception as exc:
            plain = with_one_system_message(messages)
            if plain == messages or not is_template_error(exc):
                raise
        return tokenize(tokenizer, _with(request, plain), arguments)


def _check_tokens(tokens: list[int], num_known: int) -> None:
    wrong = [token for token in tokens if not 0 <= token < num_known]
    if wrong:
        raise bad_request(f"prompt: there is no token {wrong[0]}", param="prompt")


def _split(tokenizer: Any, prompt: list[int]) -> tuple[list[list[int]], list[str]]:
    """A prompt that does not end with the user's words, so that it is kept as well.

    mlx-lm keeps a prompt up to where a user's last message ends. In a loop of tools
    that is far behind, and clients write calls back a little differently.
    """
    start = len(prompt) - 1
    if tokenizer.has_thinking:
        found = tokenizer.rfind_think_start(prompt, start=max(len(prompt) - 11, 0))
        start = found if found > 0 else start
    return [prompt[:start], prompt[start:]], ["tool", "assistant"]


def _with(request: Request, messages: list[Message]) -> Request:
    # mlx-lm changes messages in place.
    return dataclasses.replace(request, messages=copy.deepcopy(messages))


def _renamed(messages: list[Message], tokenizer: Any) -> list[Message]:
    """Messages of developers as system messages, unless the template knows them."""
    template = getattr(tokenizer, "chat_template", None)
    if "developer" in str(template):
        return messages
    return [
        message | {"role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def with_one_system_message(messages: list[Message]) -> list[Message]:
    """Messages for a template that takes one system message, and that at the top.

    Later ones stay where they are, so that what is before them stays in the cache: as
    the user's.
    """
    conversation = Conversation()
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role in ("system", "developer") and not conversation.messages:
            conversation.add_system(_text(content))
        elif role in ("system", "developer", "user"):
            conversation.add_user(content)
        else:
            conversation.messages.append(message)
    return conversation.result()


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _check_request(
    provider: server.ModelProvider, tokenizer: Any, request: Request
) -> None:
    needs_images = request.takes_images or request.has_images
    if needs_images and getattr(provider, "processor", None) is None:
        raise bad_request("messages: this model takes no images", param="messages")
    if request.must_call and not tokenizer.has_tool_calling:
        raise bad_request(
            "tool_choice: this model cannot call tools", param="tool_choice"
        )


def _begin_reply(tokenizer: Any, request: Request, tokenized: Tokenized) -> Tokenized:
    prompt, segments, kinds, state, *rest = tokenized
    beginning, next_state = request.prefill, "normal"
    if request.must_call:
        beginning, next_state = tokenizer.tool_call_start, "tool"
    if not beginning:
        return tokenized
    if state == "reasoning":
        beginning = f"{tokenizer.think_end}\n\n{beginning}"
    tokens = tokenizer.encode(beginning, add_special_tokens=False)
    segments = [*segments[:-1], segments[-1] + tokens]
    return (prompt + tokens, segments, kinds, next_state, *rest)


def _check_arguments(
    model: Any, tokenizer: Any, arguments: Arguments, prompt: list[int]
) -> None:
    check_generation(tokenizer, arguments, prompt)
    if speculation_of(model) is not None:
        check_draft_tokens(arguments)


def _limit(
    model: Any,
    request: Request,
    arguments: Arguments,
    num_tokens: int,
) -> None:
    limit = context_size(model)
    if limit is None:
        return
    if num_tokens > limit:
        raise context_overflow(num_tokens, limit)
    if arguments.max_tokens > limit - num_tokens:
        request.is_cut_by_context = True
        arguments.max_tokens = max(limit - num_tokens, 1)
