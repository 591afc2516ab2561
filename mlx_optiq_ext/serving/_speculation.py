"""Speculation for the models that mlx-lm's server serves."""

from __future__ import annotations

import logging
from typing import Any

import mlx.nn as nn

from .._errors import SpeculationError
from .._options import AUTO_AS_NUMBER, MAX_DRAFT_TOKENS
from .._record import record_of
from ..decoding import SequenceOptions, SpeculationStats
from ..drafters import (
    Drafter,
    MTPDrafter,
    PromptLookupDrafter,
    as_drafter,
    limit_drafts,
)
from ..mixins import attach_mtp
from ._errors import bad_request
from ._events import Usage


class ServedSpeculation:
    """How the sequences of one served model are decoded.

    Args:
        drafter (Drafter): What proposes tokens.
        prompt_lookup (bool): Whether what stands in their context is copied as well.
    """

    def __init__(self, drafter: Drafter, prompt_lookup: bool = False):
        self.drafter = drafter
        self.prompt_lookup = prompt_lookup


def options_of(arguments: Any, served: ServedSpeculation) -> SequenceOptions:
    """What a request asks for; its statistics are left with its arguments.

    Args:
        arguments (Arguments): Of the request.
        served (ServedSpeculation): What there is.
    """
    number = arguments.num_draft_tokens
    stats = SpeculationStats(records_sources=arguments.records_sources)
    arguments.stats = stats
    return SequenceOptions(
        "auto" if number is AUTO_AS_NUMBER else number,
        stats,
        arguments.seed,
        served.prompt_lookup and arguments.prompt_lookup,
    )


def can_share(arguments: Any) -> bool:
    """Whether a request with a seed gives the same text in a batch as it gives alone.

    What XTC draws comes from the global generator, which all sequences share.
    """
    return arguments.sampling.xtc_probability == 0


def speculation_of(model: nn.Module | None) -> ServedSpeculation | None:
    """How the sequences of a model are decoded, None if plainly."""
    return None if model is None else record_of(model).served


def check_draft_tokens(arguments: Any) -> None:
    """Refuse a request for more draft tokens than can be had; 0 is for none.

    Raises:
        APIError: 400.
    """
    if arguments.num_draft_tokens > MAX_DRAFT_TOKENS:
        raise bad_request(
            f"num_draft_tokens: expected 0 to {MAX_DRAFT_TOKENS}, got "
            f"{arguments.num_draft_tokens}",
            param="num_draft_tokens",
        )


def timings(usage: Usage) -> dict[str, Any]:
    """What speculation did for a reply, in the words of llama.cpp's server.

    Args:
        usage (Usage): Of the reply, once its end was fed.
    """
    if not usage.stats:
        return {}
    stats = SpeculationStats.total(usage.stats)
    return {
        "timings": {
            "draft_n": stats.num_drafted,
            "draft_n_accepted": stats.num_accepted,
            "draft_rounds": stats.num_rounds,
            "draft_n_per_position": stats.num_drafted_per_position,
            "draft_n_accepted_per_position": stats.num_accepted_per_position,
            "calls_per_depth": stats.num_calls_per_depth,
            "draft_n_per_source": stats.num_drafted_per_source,
            "draft_n_accepted_per_source": stats.num_accepted_per_source,
        }
    }


def serve_speculatively(provider: Any) -> None:
    """Let requests for the model that was just loaded be decoded speculatively.

    Args:
        provider (ModelProvider): mlx-lm's, with the flags of the command line.

    Raises:
        SpeculationError: If the model of the command line cannot be the target.
    """
    flags = provider.cli_args
    is_default = provider.model_key[0] == flags.model
    prompt_lookup = getattr(flags, "prompt_lookup", False)
    try:
        _check_not_distributed(provider)
        drafter = limit_drafts(
            _drafter(provider.model, flags, is_default),
            getattr(flags, "draft_vocab", None),
        )
    except SpeculationError as error:
        if is_default:
            raise
        # A client chose this model, and the flags were not about it.
        if provider.is_distributed or not prompt_lookup:
            logging.warning(
                "%s is served without speculation: %s", provider.model_key, error
            )
            return
        logging.warning("%s is served without a drafter: %s", provider.model_key, error)
        drafter = PromptLookupDrafter()
    record_of(provider.model).served = ServedSpeculation(drafter, prompt_lookup)


def _drafter(model: nn.Module, flags: Any, is_default: bool) -> Drafter:
    if flags.draft is not None:
        return as_drafter(flags.draft, model)
    if not flags.mtp:
        return PromptLookupDrafter()
    attach_mtp(model, flags.mtp if is_default and flags.mtp is not True else None)
    return MTPDrafter(model)


def _check_not_distributed(provider: Any) -> None:
    if provider.is_distributed:
        raise SpeculationError(
            "Cannot speculate: the model is distributed over several processes. Serve "
            "it in one, or without --mtp, --draft and --prompt-lookup."
        )
