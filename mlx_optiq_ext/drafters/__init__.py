"""What proposes tokens: the MTP head, an assistant or an ordinary draft model."""

from ._assistant import GemmaAssistantDrafter
from ._draft_model import DraftModelDrafter
from ._mtp import MTPDrafter
from ._protocol import Drafter, DraftSession, Proposal
from ._registry import REGISTRY, Unbound, as_drafter, is_draft_model, limit_drafts

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
    "is_draft_model",
    "limit_drafts",
]
