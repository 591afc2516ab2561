"""Hands a chat to mlx-lm's server as one of its own requests."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server

from .._random_state import random_state_kept
from .._record import record_of
from ._chat import Chat
from ._errors import bad_request, context_overflow
from ._fields import number, optional
from ._images import has_images, has_remote_images, inline_images
from ._models import DEFAULT_MODEL, loadable_name

# For APIs whose requests need not say how long a reply may get.
MAX_TOKENS = 32768

Tokenized = tuple[Any, ...]


@dataclass
class ChatRequest(server.CompletionRequest):
    """A chat completion whose reply may have to begin in a certain way.

    Args:
        chat: What is asked for.
        counts_only: The prompt is tokenised and no more.
        takes_images: The model has to take images, whether or not there are any.
        is_cut_by_context: Set when the context is what limits the reply.
        tokenizer: Set to the tokenizer of the model that serves the request.
    """

    chat: Chat = field(default_factory=lambda: Chat(None, []))
    counts_only: bool = False
    takes_images: bool = False
    is_cut_by_context: bool = False
    tokenizer: Any = None


class Counted(Exception):
    """Ends a request that wanted to know the length of its prompt."""

    def __init__(self, num_tokens: int):
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


def chat_request(chat: Chat, *, counts_only: bool = False) -> ChatRequest:
    # mlx-lm changes messages in place.
    messages = copy.deepcopy(chat.messages)
    tools = chat.tools
    return ChatRequest("chat", "", messages, tools, None, chat, counts_only)


def generation_arguments(chat: Chat, cli_args: Any) -> server.GenerationArguments:
    """The sampling parameters of a request, the server's where it has none.

    Raises:
        APIError: 400, if one is not what it has to be.
    """
    body = chat.body
    adapter = optional(body, "adapters", str)
    return server.GenerationArguments(
        model=server.ModelDescription(
            model=loadable_name(chat.model, cli_args, adapter),
            draft=optional(body, "draft_model", str, DEFAULT_MODEL),
            adapter=adapter,
        ),
        sampling=_sampling(body, cli_args),
        logits=_logits(body, cli_args),
        stop_words=[],  # mlx-lm finds only those that are spelled in its own tokens.
        max_tokens=_max_tokens(chat, cli_args),
        num_draft_tokens=number(
            body, "num_draft_tokens", cli_args.num_draft_tokens, least=0, kind=int
        ),
        logprobs=False,
        top_logprobs=-1,
        seed=number(body, "seed", None, kind=int),
        chat_template_kwargs=_template_arguments(chat, cli_args),
    )


def count_tokens(generator: server.ResponseGenerator, chat: Chat) -> int:
    """The length of a chat's prompt, by the way that generation goes as well."""
    load_images(generator, chat)
    request = chat_request(chat, counts_only=True)
    arguments = generation_arguments(chat, generator.cli_args)
    tokenizer = _loaded_tokenizer(generator.model_provider, arguments)
    try:
        if tokenizer is not None and not has_images(request.messages):
            # No need to wait for the requests that are being served.
            generator._tokenize(tokenizer, request, arguments)
        else:
            generator.generate(request, arguments)
    except Counted as counted:
        return counted.num_tokens
    raise AssertionError("a request that only counts was served")


def load_images(generator: server.ResponseGenerator, chat: Chat) -> None:
    """Put the bytes of a chat's remote images into it, if its model takes images.

    Raises:
        APIError: 400, if it takes none, or if an image cannot be had.
    """
    if has_remote_images(chat.messages):
        _check_takes_images(generator, chat)
        allow_remote = getattr(generator.cli_args, "allow_remote_images", False)
        inline_images(chat.messages, allow_remote)


def _check_takes_images(generator: server.ResponseGenerator, chat: Chat) -> None:
    # Only the generation thread knows the model: it may have to load it first.
    messages = [{"role": "user", "content": "image"}]
    probe = Chat(chat.model, messages, body=chat.body)
    request = chat_request(probe, counts_only=True)
    request.takes_images = True
    with contextlib.suppress(Counted):
        generator.generate(request, generation_arguments(probe, generator.cli_args))


def check_request(
    generator: server.ResponseGenerator, tokenizer: Any, request: ChatRequest
) -> None:
    """Refuse what the model cannot do.

    Raises:
        APIError: 400, with the reason.
    """
    processor = getattr(generator.model_provider, "processor", None)
    if processor is None and (request.takes_images or has_images(request.messages)):
        raise bad_request("messages: this model takes no images", param="messages")
    if request.chat.must_call and not tokenizer.has_tool_calling:
        raise bad_request(
            "tool_choice: this model cannot call tools", param="tool_choice"
        )


def finish_prompt(
    generator: server.ResponseGenerator,
    tokenizer: Any,
    request: ChatRequest,
    arguments: server.GenerationArguments,
    tokenized: Tokenized,
) -> Tokenized:
    """Add the beginning of the reply to a prompt, and see that there is room for it.

    Raises:
        APIError: 400, if the prompt is longer than the model's context.
        Counted: If nothing but the number of its tokens was asked for.
    """
    request.tokenizer = tokenizer
    tokenized = _begin_reply(tokenizer, request.chat, tokenized)
    num_tokens = len(tokenized[0])
    if request.counts_only:
        raise Counted(num_tokens)
    limit = context_size(generator.model_provider.model)
    if limit is not None and num_tokens > limit:
        raise context_overflow(num_tokens, limit)
    if limit is not None and arguments.max_tokens > limit - num_tokens:
        request.is_cut_by_context = True
        arguments.max_tokens = max(limit - num_tokens, 1)
    return tokenized


def check_generation(
    tokenizer: Any, arguments: server.GenerationArguments, prompt: list[int]
) -> None:
    """Find out now whether a generation would fail, for later others fail with it.

    Raises:
        ValueError: If it would.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    if arguments.max_tokens < 1:
        raise ValueError(f"max_tokens: {arguments.max_tokens} is not at least 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 1 << 64:
        raise ValueError(f"seed: {arguments.seed} is not between 0 and 2**64 - 1")
    bias = arguments.logits.logit_bias or {}
    if wrong := [token for token in bias if not 0 <= token < len(tokenizer)]:
        raise ValueError(f"logit_bias: there is no token {wrong[0]}")
    try:
        _sample_lazily(tokenizer, arguments)
    except Exception as exc:
        raise ValueError(f"sampling is not possible like this: {exc}") from exc


def _sample_lazily(tokenizer: Any, arguments: server.GenerationArguments) -> None:
    # A lazy graph: nothing is computed, but shapes and arguments are checked.
    server.make_stop_sequences(tokenizer, arguments.stop_words)
    logits = mx.zeros((1, len(tokenizer)))
    for process in server._make_logits_processors(arguments):
        logits = process(mx.array([0]), logits)
    sampler = server._make_sampler(arguments, tokenizer)
    if arguments.sampling.temperature > 0:
        with random_state_kept():
            sampler(logits)


def context_size(model: Any) -> int | None:
    """Positions that a model was made for, None if its configuration is not known."""
    source = record_of(model).source
    return None if source is None else _read_context(source / "config.json")


@functools.cache
def _read_context(path: Path) -> int | None:
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    return configured_context(config.get("text_config") or config)


def configured_context(config: dict[str, Any]) -> int | None:
    """Positions according to a configuration, stretched ones included."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") or 1
    original = scaling.get("original_max_position_embeddings") or 0
    size = max(config.get("max_position_embeddings") or 0, int(factor * original))
    return size or None


def _begin_reply(tokenizer: Any, chat: Chat, tokenized: Tokenized) -> Tokenized:
    prompt, segments, kinds, state, *rest = tokenized
    beginning, next_state = chat.prefill, "normal"
    if chat.must_call:
        beginning, next_state = tokenizer.tool_call_start, "tool"
    if not beginning:
        return tokenized
    if state == "reasoning":
        beginning = f"{tokenizer.think_end}\n\n{beginning}"
    tokens = tokenizer.encode(beginning, add_special_tokens=False)
    segments = [*segments[:-1], segments[-1] + tokens]
    return (prompt + tokens, segments, kinds, next_state, *rest)


def _loaded_tokenizer(provider: Any, arguments: server.GenerationArguments) -> Any:
    """The tokenizer for a request, None if its model is not the one that is loaded.

    The generation thread may be loading another model at the same time. It forgets the
    key first and sets it again before the tokenizer, so a tokenizer that was read
    between two looks at the same key belongs to it.
    """
    key = provider.model_key
    tokenizer = provider.tokenizer
    is_default = arguments.model.model == DEFAULT_MODEL
    if not is_default or key is None or key[0] != provider.cli_args.model:
        return None
    return tokenizer if provider.model_key is key else None


def _sampling(body: dict[str, Any], cli_args: Any) -> server.SamplingArguments:
    return server.SamplingArguments(
        temperature=number(body, "temperature", cli_args.temp, least=0),
        top_p=number(body, "top_p", cli_args.top_p, least=0, most=1),
        top_k=number(body, "top_k", cli_args.top_k, least=0, kind=int),
        min_p=number(body, "min_p", cli_args.min_p, least=0, most=1),
        xtc_probability=number(body, "xtc_probability", 0.0, least=0, most=1),
        xtc_threshold=number(body, "xtc_threshold", 0.1, least=0, most=1),
    )


def _logits(body: dict[str, Any], cli_args: Any) -> server.LogitsProcessorArguments:
    penalties: dict[str, Any] = {}
    for name, least in (("repetition", 0.0), ("presence", -inf), ("frequency", -inf)):
        penalty, size = f"{name}_penalty", f"{name}_context_size"
        default = getattr(cli_args, penalty, 0.0)
        penalties[penalty] = number(body, penalty, default, least=least)
        penalties[size] = number(body, size, 20, least=0, kind=int)
    bias = optional(body, "logit_bias", dict)
    return server.LogitsProcessorArguments(logit_bias=_read_bias(bias), **penalties)


def _read_bias(bias: dict[str, Any] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    try:
        return {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError) as exc:
        raise bad_request(
            "logit_bias: expected numbers by token id", param="logit_bias"
        ) from exc


def _max_tokens(chat: Chat, cli_args: Any) -> int:
    if chat.max_tokens is None:
        return max(cli_args.max_tokens, MAX_TOKENS)
    return max(chat.max_tokens, 1)


def _template_arguments(chat: Chat, cli_args: Any) -> dict[str, Any]:
    given = cli_args.chat_template_args
    names = {"enable_thinking"} & set(given)
    arguments = {name: given[name] for name in names} | chat.template
    if chat.has_thinking is not None:
        arguments["enable_thinking"] = chat.has_thinking
    elif not chat.thinks_by_default:
        arguments.setdefault("enable_thinking", False)
    return arguments | optional(chat.body, "chat_template_kwargs", dict, {})
