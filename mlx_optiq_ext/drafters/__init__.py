"""What proposes tokens: the MTP head or an ordinary draft model."""

from __future__ import annotations

import mlx.nn as nn

from ..mixins.qwen3_5 import attach_mtp
from ._draft_model import DraftModelDrafter
from ._mtp import MTPDrafter
from ._protocol import Drafter, DraftSession, Proposal

__all__ = [
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "MTPDrafter",
    "Proposal",
    "as_drafter",
]


def as_drafter(drafter: Drafter | nn.Module | None, model: nn.Module) -> Drafter:
    """The drafter meant by a ``drafter`` argument: by default the model's MTP head."""
    if drafter is None:
        attach_mtp(model)
        return MTPDrafter(model)
    if isinstance(drafter, nn.Module):
        return DraftModelDrafter(drafter)
    return drafter
