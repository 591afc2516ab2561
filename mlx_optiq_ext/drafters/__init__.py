"""What proposes tokens: an MTP head, an assistant, a draft model, or the context."""

from ._assistant import GemmaAssistantDrafter
from ._batched import (
    BatchDraftSession,
    Committed,
    Proposals,
    SeparateSessions,
    together,
)
from ._draft_model import DraftModelDrafter
from ._lookup import COPIES, Lookup, PromptLookupDrafter
from ._mtp import MTPDrafter
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
    "COPIES",
    "REGISTRY",
    "BatchDraftSession",
    "Committed",
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "GemmaAssistantDrafter",
    "Lookup",
    "MTPDrafter",
    "PromptLookupDrafter",
    "Proposal",
    "Proposals",
    "SeparateSessions",
    "Unbound",
    "as_drafter",
    "check_draft_model",
    "is_draft_model",
    "limit_drafts",
    "together",
]
