"""The one record in which this package keeps all that it remembers of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

_ATTRIBUTE = "_optiq_record"


@dataclass
class ModelRecord:
    """The things that belong to one model and are not its parameters.

    Invariant: the record of a copied or unpickled model has the source and nothing
    else, because the class of such a model is mlx-lm's own.

    Args:
        source (Path, optional): Where mlx-lm loaded the model from.
        head (MTPHead, optional): The head that is attached.
        head_source (str, optional): Where the head came from.
        head_bits (int, optional): What it was asked to be kept in.
        is_head_quantized (bool): Whether it is stored in full and was quantised when it
            was loaded.
        drafter (Any): The drafter that was last loaded for the model.
        drafter_source (str, optional): Where the drafter came from.
        draft_vocabulary (Any): The part of the vocabulary that was last drafted from.
        round_times (dict): The seconds that rounds take, by what drafts in them and for
            about how many sequences.
        packed (list): The modules of which projections were packed.
        served (Any): The settings with which a server decodes the model's sequences.
    """

    source: Path | None = None
    head: Any = None
    head_source: str | None = None
    head_bits: int | None = None
    is_head_quantized: bool = False
    drafter: Any = None
    drafter_source: str | None = None
    draft_vocabulary: Any = None
    round_times: dict[Any, Any] = field(default_factory=dict)
    packed: list[Any] = field(default_factory=list)
    served: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelRecord, (self.source,)


def record_of(model: nn.Module) -> ModelRecord:
    """Return the record of a model, and create it if there is none.

    Args:
        model (nn.Module): A model that mlx-lm loaded.
    """
    record = getattr(model, _ATTRIBUTE, None)
    if record is None:
        record = ModelRecord()
        # nn.Module.__setattr__ is bypassed because it makes parameters of what it gets.
        object.__setattr__(model, _ATTRIBUTE, record)
    return record
