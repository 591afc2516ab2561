"""Grammars that replies follow, and limits on how long they think."""

from ._constraint import ReplyConstraint
from ._errors import GrammarError, not_allowed
from ._masks import masked
from ._processor import ConstraintProcessor
from ._protocol import Constraint
from ._rules import ReplyRules, Shape
from ._sources import ANY_OBJECT, Source

__all__ = [
    "ANY_OBJECT",
    "Constraint",
    "ConstraintProcessor",
    "GrammarError",
    "ReplyConstraint",
    "ReplyRules",
    "Shape",
    "Source",
    "masked",
    "not_allowed",
]
