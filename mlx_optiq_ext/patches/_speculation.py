"""Carries speculation through functions of mlx-lm, in the place of a draft model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    RotatingKVCache,
    make_prompt_cache,
)

from .._options import NumDraftTokens, check_num_draft_tokens
from ..decoding import SequenceOptions, SpeculationStats, Token, spec_generate_step
from ..drafters import Drafter, DraftModelDrafter, MTPDrafter, as_drafter, limit_drafts
from ..mixins import attach_mtp
from ._request import current

# mlx-lm drops or refuses these options where there is a draft model.
CARRIED_OPTIONS = ("max_kv_size", "prompt_progress_callback", "input_embeddings")


class Speculation:
    """An object that mlx-lm takes for a draft model and passes on to our patches.

    Args:
        drafter (Drafter): What proposes tokens.
        num_draft_tokens (int or str, optional): The number of tokens to draft in a
          round, or ``"auto"``. Default: that of ``spec_generate_step``.
        stats (SpeculationStats, optional): The counts to add to. Default: new ones.
        seed (int, optional): The seed of what is sampled.
        prompt_lookup (bool): Whether what stands in the context is copied as well.
    """

    def __init__(
        self,
        drafter: Drafter,
        num_draft_tokens: NumDraftTokens | None = None,
        stats: SpeculationStats | None = None,
        seed: int | None = None,
        prompt_lookup: bool = False,
    ):
        self._settings: dict[str, Any] = {
            "drafter": drafter,
            "seed": seed,
            "prompt_lookup": prompt_lookup or not drafter.computes_drafts,
        }
        if num_draft_tokens is not None:
            self._settings["num_draft_tokens"] = num_draft_tokens
        self._steps: Generator[Token, None, None] | None = None
        self.stats = stats or SpeculationStats()

    @property
    def drafter(self) -> Drafter:
        return self._settings["drafter"]

    @property
    def num_draft_tokens(self) -> NumDraftTokens:
        return self._settings.get("num_draft_tokens", "auto")

    @property
    def prompt_lookup(self) -> bool:
        return self._settings["prompt_lookup"]

    def carry(self, options: dict[str, Any]) -> None:
        """Take the options that mlx-lm would drop, and use them in ``steps``.

        Args:
            options (dict): Keyword arguments, from which they are removed.
        """
        for name in CARRIED_OPTIONS:
            if name in options:
                self._settings[name] = options.pop(name)

    def steps(self, **arguments: Any) -> Generator[Token, None, None]:
        arguments.pop("num_draft_tokens", None)
        self._steps = spec_generate_step(
            **arguments, **self._settings, stats=self.stats
        )
        return self._steps

    def responses(
        self, responses: Generator[GenerationResponse, None, None]
    ) -> Iterator[GenerationResponse]:
        """Pass on responses, and add the counts to the last one.

        The steps are closed before the last response is yielded, so that the prompt
        cache then holds exactly the tokens of the text.
        """
        with contextlib.closing(responses):
            for response in responses:
                if response.finish_reason is not None:
                    if self._steps is not None:
                        self._steps.close()
                    response.speculation = self.stats
                yield response


class BatchSpeculation:
    """How the sequences of one call of ``batch_generate`` are decoded.

    Args:
        speculation (Speculation): What was asked for.
    """

    def __init__(self, speculation: Speculation):
        self.drafter = speculation.drafter
        self.stats: list[SpeculationStats] = []
        self._num_draft_tokens = speculation.num_draft_tokens
        self._prompt_lookup = speculation.prompt_lookup

    def sequence_options(self) -> SequenceOptions:
        """Those of the next sequence."""
        self.stats.append(SpeculationStats())
        return SequenceOptions(
            self._num_draft_tokens, self.stats[-1], prompt_lookup=self._prompt_lookup
        )


def take_request(
    model: nn.Module, options: dict[str, Any]
) -> Speculation | nn.Module | None:
    """Take the request for speculation out of keyword arguments.

    Args:
        model (nn.Module): The target.
        options (dict): The keyword arguments of a call of ``stream_generate``, without
          those for speculation afterwards.

    Returns:
        Speculation, nn.Module or None: The speculation that is asked for, or the
        ``draft_model`` of ``options`` if mlx-lm can speculate with that itself.

    Raises:
        ValueError: If the request is malformed or contradicts another argument.
        SpeculationError: If the model cannot do what is asked.
    """
    draft_model = options.get("draft_model")
    if isinstance(draft_model, Speculation):
        return draft_model
    request, stats, seed = current.get(), None, None
    if request is not None and request.is_speculative:
        options |= request.options
        stats, seed = request.stats, request.seed
    mtp, draft = options.pop("mtp", None), options.pop("draft", None)
    draft_vocab = options.pop("draft_vocab", None)
    prompt_lookup = _check_prompt_lookup(options.pop("prompt_lookup", None))
    if mtp is False:
        mtp = None
    _check_one({"mtp": mtp, "draft": draft, "draft_model": draft_model})
    if mtp is None and draft_vocab is not None and draft is None:
        raise ValueError("draft_vocab needs mtp=True or mtp=PATH.")
    if mtp is None and draft is None and not prompt_lookup:
        return draft_model and rescued(model, draft_model, options)
    num_draft_tokens = options.pop("num_draft_tokens", None)
    if num_draft_tokens is not None:
        check_num_draft_tokens(num_draft_tokens)
    if mtp is not None:
        attach_mtp(model, _check_mtp(mtp))
        drafter: Drafter = MTPDrafter(model)
    else:
        named = draft_model if draft is None else draft
        drafter = as_drafter(named, model, prompt_lookup, argument="draft")
    drafter = limit_drafts(drafter, draft_vocab)
    return Speculation(drafter, num_draft_tokens, stats, seed, prompt_lookup)


def _check_one(requests: Mapping[str, Any]) -> None:
    names = [name for name, request in requests.items() if request is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} exclude each other, expected one.")


def rescued(
    model: nn.Module,
    draft_model: nn.Module | Speculation,
    options: Mapping[str, Any],
) -> nn.Module | Speculation:
    """Replace a draft model by our speculation where mlx-lm could not roll back.

    Args:
        model (nn.Module): The target.
        draft_model (nn.Module or Speculation): What mlx-lm was given to draft with.
        options (Mapping[str, Any]): The keyword arguments of the call.
    """
    if isinstance(draft_model, Speculation):
        return draft_model
    cache = options.get("prompt_cache") or (
        make_prompt_cache(model) + make_prompt_cache(draft_model)
    )
    if not any(map(_is_untrimmable, cache)):
        return draft_model
    return Speculation(
        DraftModelDrafter(draft_model), options.get("num_draft_tokens", 2)
    )


def _check_mtp(mtp: Any) -> str | None:
    """Return the source that an ``mtp`` argument names, None for the model's own."""
    if mtp is True:
        return None
    if isinstance(mtp, (str, os.PathLike)) and os.fspath(mtp):
        return os.fspath(mtp)
    raise ValueError(f"mtp must be True, False or a path, got {mtp!r}.")


def _check_prompt_lookup(prompt_lookup: Any) -> bool:
    if prompt_lookup not in (None, True, False):
        raise ValueError(f"prompt_lookup must be True or False, got {prompt_lookup!r}.")
    return bool(prompt_lookup)


def _is_untrimmable(entry: Any) -> bool:
    """Tell whether an entry cannot be trimmed, now or once its window is full."""
    if isinstance(entry, CacheList):
        return any(map(_is_untrimmable, entry.caches))
    return isinstance(entry, (ArraysCache, RotatingKVCache))
