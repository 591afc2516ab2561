"""What this package remembers of a model, all in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

_ATTRIBUTE = "_optiq_record"


@dataclass
class ModelRecord:
    """What goes with one model and is none of its parameters.

    Invariant: the record of a copy, and of a model that was pickled, has the source and
    nothing else, because the class of a copy is mlx-lm's own.

    Args:
        source (Path, optional): Where mlx-lm loaded the model from.
        head (MTPHead, optional): The head that is attached.
        head_source (str, optional): Where the head came from.
        drafter (Any): The drafter that was last loaded for the model.
        drafter_source (str, optional): Where the drafter came from.
        draft_vocabulary (Any): The part of the vocabulary that was last drafted from.
        round_times (dict): The seconds that rounds take, by what drafts in them.
        served (Any): How a server decodes the model's sequences.
    """

    source: Path | None = None
    head: Any = None
    head_source: str | None = None
    drafter: Any = None
    drafter_source: str | None = None
    draft_vocabulary: Any = None
    round_times: dict[str, Any] = field(default_factory=dict)
    served: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelRecord, (self.source,)


def record_of(model: nn.Module) -> ModelRecord:
    """The record of a model, an empty one if there was none."""
    record = getattr(model, _ATTRIBUTE, None)
    if record is None:
        record = ModelRecord()
        # Not by nn.Module.__setattr__, which makes modules and arrays parameters.
        object.__setattr__(model, _ATTRIBUTE, record)
    return record
