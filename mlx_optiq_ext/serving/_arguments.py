"""Reads how a reply is to be sampled, in the fields that all APIs share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from typing import Any

import mlx.core as mx
from mlx_lm import server

from .._random_state import random_state_kept
from ..decoding import SpeculationStats
from ._errors import bad_request
from ._fields import number, optional
from ._models import DEFAULT_MODEL, loadable_name
from ._request import Request
from ._sampling import given_fields


@dataclass
class Arguments(server.GenerationArguments):
    """mlx-lm's arguments of a generation, with what else goes through its thread.

    Args:
        given: Names of fields that the request or the command line says something
            about, None if nothing is to be recommended for the others.
        inbox: Where the reply goes, once the request is taken from the line.
        stats: Counts what speculation does, None if the model is decoded plainly.
        is_single: The request is served by itself.
        prompt_lookup: Whether what stands in the context may be copied.
        records_sources: Whether it is kept what drafted each token.
    """

    given: Collection[str] | None = None
    inbox: Any = None
    stats: SpeculationStats | None = None
    is_single: bool = False
    records_sources: bool = False
    prompt_lookup: bool = True


def generation_arguments(request: Request, cli_args: Any) -> Arguments:
    """What mlx-lm is told of a request, the server's defaults where it says nothing.

    Raises:
        APIError: 400, if a field is not what it has to be.
    """
    body = request.body
    adapter = optional(body, "adapters", str)
    return Arguments(
        model=server.ModelDescription(
            model=loadable_name(request.model, cli_args, adapter),
            draft=optional(body, "draft_model", str, DEFAULT_MODEL),
            adapter=adapter,
        ),
        sampling=_sampling(body, cli_args),
        logits=_logits(body, cli_args),
        stop_words=[],  # mlx-lm finds only those that are spelled in its own tokens.
        max_tokens=_max_tokens(request, cli_args),
        num_draft_tokens=number(
            body, "num_draft_tokens", cli_args.num_draft_tokens, least=0, kind=int
        ),
        logprobs=request.gives_logprobs,
        top_logprobs=request.num_top_logprobs or -1,
        seed=number(body, "seed", None, kind=int),
        chat_template_kwargs=_template_arguments(request, cli_args),
        given=given_fields(body, cli_args),
        records_sources=request.gives_sources,
        prompt_lookup=optional(body, "prompt_lookup", bool, True),
    )


def check_generation(
    tokenizer: Any, arguments: server.GenerationArguments, prompt: list[int]
) -> None:
    """Find out now whether a generation would fail, for later others fail with it.

    Raises:
        ValueError: If it would.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
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
    logits = mx.zeros((1, len(tokenizer)))
    for process in server._make_logits_processors(arguments):
        logits = process(mx.array([0]), logits)
    sampler = server._make_sampler(arguments, tokenizer)
    if arguments.sampling.temperature > 0:
        with random_state_kept():
            sampler(logits)


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


def _max_tokens(request: Request, cli_args: Any) -> int:
    if request.max_tokens is None:
        return max(cli_args.max_tokens, request.least_max_tokens)
    return max(request.max_tokens, 1)


def _template_arguments(request: Request, cli_args: Any) -> dict[str, Any]:
    given = cli_args.chat_template_args
    names = {"enable_thinking"} & set(given)
    arguments = {name: given[name] for name in names} | request.template
    if request.has_thinking is not None:
        arguments["enable_thinking"] = request.has_thinking
    elif not request.thinks_by_default:
        arguments.setdefault("enable_thinking", False)
    return arguments | optional(request.body, "chat_template_kwargs", dict, {})
