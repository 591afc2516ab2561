"""Which drafter a checkpoint is, and how it meets its target.

To add a kind of drafter, write its class in a file of this package and name it in
``REGISTRY``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.nn as nn
from mlx_lm.utils import load

from .._checkpoints import Source, read_config
from .._errors import SpeculationError
from .._options import DraftVocab, check_draft_vocab
from ..assistants import MODEL_TYPES
from ..mixins.qwen3_5 import attach_mtp
from ._assistant import GemmaAssistantDrafter
from ._draft_model import DraftModelDrafter
from ._mtp import MTPDrafter
from ._protocol import Drafter


@runtime_checkable
class Unbound(Protocol):
    """A drafter that has to know its target before it can open a session."""

    def bind(self, model: nn.Module) -> Drafter:
        """The drafter for a target.

        Raises:
            SpeculationError: If it cannot draft for this target.
        """
        ...


class MTPHeadSource:
    """An MTP head by itself, to be attached to a model.

    Args:
        source (str or Path): A folder, a ``.safetensors`` file or a Hub id.
    """

    def __init__(self, source: Source):
        self._source = os.fspath(source)

    def bind(self, model: nn.Module) -> MTPDrafter:
        attach_mtp(model, self._source)
        return MTPDrafter(model)


Loader = Callable[[Source], Drafter | Unbound | nn.Module]

# By the model type in config.json, or the suffix of a file. All others are ordinary
# language models.
REGISTRY: dict[str, Loader] = {
    ".safetensors": MTPHeadSource,
    "qwen3_5_mtp": MTPHeadSource,
    "qwen3_5_moe_mtp": MTPHeadSource,
    **dict.fromkeys(MODEL_TYPES, GemmaAssistantDrafter.from_pretrained),
}


def as_drafter(
    drafter: Drafter | Unbound | nn.Module | Source | None,
    model: nn.Module,
    argument: str = "drafter",
) -> Drafter:
    """The drafter that an argument means, ready to draft for a model.

    Args:
        drafter: A drafter, an ordinary draft model, or the folder or Hub id of one of
          them. None is the model's own MTP head.
        model (nn.Module): The target.
        argument (str): What errors call the first argument.

    Raises:
        ValueError: If the argument is none of these.
        SpeculationError: If the drafter cannot be loaded, or not draft for this target.
    """
    if drafter is None:
        attach_mtp(model)
        return MTPDrafter(model)
    found: Any = drafter
    if isinstance(found, (str, os.PathLike)) and os.fspath(found):
        found = _load_once(found, model)
    if isinstance(found, nn.Module):
        return DraftModelDrafter(found)
    if isinstance(found, Unbound):
        return found.bind(model)
    if not hasattr(found, "open"):
        raise ValueError(
            f"{argument} must be a drafter, a model or a path, got {found!r}."
        )
    return found


def limit_drafts(drafter: Drafter, draft_vocab: DraftVocab | None) -> Drafter:
    """The drafter, proposing only some tokens if so many or these are wanted.

    Args:
        drafter (Drafter): Of any kind.
        draft_vocab (int or path, optional): As for ``MTPDrafter``.

    Raises:
        ValueError: If ``draft_vocab`` is neither a number nor a path.
        SpeculationError: If this drafter cannot, or the file is not such a file.
    """
    if draft_vocab is None:
        return drafter
    check_draft_vocab(draft_vocab)
    if not isinstance(drafter, MTPDrafter):
        raise SpeculationError(
            "Cannot speculate with a part of the vocabulary: draft_vocab is for MTP "
            f"heads, and the drafter is a {type(drafter).__name__}."
        )
    return drafter.limited(draft_vocab)


def is_draft_model(source: Source) -> bool:
    """Whether a checkpoint is an ordinary language model, as far as can be told."""
    try:
        return _kind(source) not in REGISTRY
    except SpeculationError:
        return True


def _kind(source: Source) -> str:
    path = Path(source).expanduser()
    return path.suffix if path.is_file() else read_config(source).get("model_type", "")


def _load_once(source: Source, model: nn.Module) -> Any:
    """Load a drafter, unless it is the one that was last loaded for this target."""
    path = Path(source).expanduser()
    place = str(path.absolute() if path.exists() else source)
    if getattr(model, "_drafter_loaded_from", None) != place:
        drafter = REGISTRY.get(_kind(source), _load_model)(place)
        # Not by nn.Module.__setattr__, which would make a module one of the target's.
        object.__setattr__(model, "_drafter", drafter)
        object.__setattr__(model, "_drafter_loaded_from", place)
    return model._drafter


def _load_model(source: Source) -> nn.Module:
    model, *_ = load(os.fspath(source))
    return model
