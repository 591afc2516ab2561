"""Finds out which drafter a checkpoint is, and prepares it for its target.

To add a kind of drafter, write its class in a file of this package and name it in
``REGISTRY``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load

from .._checkpoints import CONFIG, Source, find_folder, read_config
from .._errors import SpeculationError
from .._options import DraftVocab, check_draft_vocab
from .._record import record_of
from ..assistants import MODEL_TYPES
from ..heads import MODEL_TYPES as HEAD_OWNERS
from ..mixins import attach_mtp
from ._assistant import GemmaAssistantDrafter
from ._draft_model import DraftModelDrafter
from ._lookup import PromptLookupDrafter
from ._mtp import MTPDrafter
from ._protocol import Drafter


@runtime_checkable
class Unbound(Protocol):
    """A drafter that has to know its target before it can open a session."""

    def bind(self, model: nn.Module) -> Drafter:
        """Make the drafter ready for a target.

        Args:
            model (nn.Module): The target.

        Raises:
            SpeculationError: If it cannot draft for this target.
        """
        ...


class MTPHeadSource:
    """An MTP head that is stored by itself and has yet to be attached to a model.

    Args:
        source (str or Path): A folder, a ``.safetensors`` file or a Hub id.
    """

    def __init__(self, source: Source):
        self._source = os.fspath(source)

    def bind(self, model: nn.Module) -> MTPDrafter:
        attach_mtp(model, self._source)
        return MTPDrafter(model)


HEAD_FILE = ".safetensors"

Loader = Callable[[Source], Drafter | Unbound | nn.Module]

# The key is the model type in config.json, or the suffix of a file. A checkpoint of any
# other type is an ordinary language model.
REGISTRY: dict[str, Loader] = {
    HEAD_FILE: MTPHeadSource,
    "qwen3_5_mtp": MTPHeadSource,
    "qwen3_5_moe_mtp": MTPHeadSource,
    **dict.fromkeys(MODEL_TYPES, GemmaAssistantDrafter.from_pretrained),
}


def as_drafter(
    drafter: Drafter | Unbound | nn.Module | Source | None,
    model: nn.Module,
    prompt_lookup: bool = False,
    argument: str = "drafter",
) -> Drafter:
    """Find the drafter that an argument means, and make it ready for a model.

    Args:
        drafter (Drafter, nn.Module, str or Path, optional): A drafter, an ordinary
          draft model, or the folder or Hub id of one of them. None means the model's
          own MTP head, or with ``prompt_lookup`` no other source than that.
        model (nn.Module): The target.
        prompt_lookup (bool): Whether copies of the context are drafted as well.
        argument (str): The name of the first argument in errors.

    Raises:
        ValueError: If the argument is none of these.
        SpeculationError: If the drafter cannot be loaded, or not draft for this target.
    """
    if drafter is None and prompt_lookup:
        return PromptLookupDrafter()
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


def check_draft_model(source: Source) -> None:
    """Check that a place has the files of an ordinary language model.

    Args:
        source (str or Path): A folder or a Hub id.

    Raises:
        SpeculationError: If it lacks a configuration or weights.
    """
    folder = find_folder(source)
    missing = [
        pattern
        for pattern in (CONFIG, "model*.safetensors")
        if not any(folder.glob(pattern))
    ]
    if missing:
        raise SpeculationError(
            f"Cannot speculate: {source} is no language model, it has no "
            f"{' and no '.join(missing)}."
        )


def _kind(source: Source) -> str:
    """Find the key of a checkpoint, which is in ``REGISTRY`` if it is a drafter."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.suffix
    kind = read_config(source).get("model_type", "")
    if kind in HEAD_OWNERS and path.is_dir() and not _has_trunk(path):
        return HEAD_FILE
    return kind


def _has_trunk(folder: Path) -> bool:
    """Tell whether the weights in a folder are those of a whole language model."""
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            names = mx.load(str(file)).keys()
        except (RuntimeError, ValueError):  # mlx-lm's own error says what is wrong.
            return True
        if any("embed_tokens." in name for name in names):
            return True
    return False


def _load_once(source: Source, model: nn.Module) -> Any:
    """Load a drafter, unless it is the one that was last loaded for this target."""
    path = Path(source).expanduser()
    place = str(path.absolute() if path.exists() else source)
    record = record_of(model)
    if record.drafter_source != place:
        record.drafter = REGISTRY.get(_kind(source), _load_model)(place)
        record.drafter_source = place
    return record.drafter


def _load_model(source: Source) -> nn.Module:
    model, *_ = load(os.fspath(source))
    return model
