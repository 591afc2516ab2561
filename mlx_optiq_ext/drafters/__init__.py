"""What proposes tokens: the MTP head, an assistant or an ordinary draft model."""

from ._assistant import GemmaAssistantDrafter
from ._draft_model import DraftModelDrafter
from ._mtp import MTPDrafter
from ._priming import keep_primed
from ._protocol import Drafter, DraftSession, Proposal
from ._registry import (
    REGISTRY,
    Unbound,
    as_drafter,
    check_draft_model,
    is_draft_model,
    limit_drafts,
)

__all__ = [
    "REGISTRY",
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "GemmaAssistantDrafter",
    "MTPDrafter",
    "Proposal",
    "Unbound",
    "as_drafter",
    "check_draft_model",
    "is_draft_model",
    "keep_primed",
    "limit_drafts",
]
