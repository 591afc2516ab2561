"""Grammars that replies follow, and limits on how long they think."""

from .._errors import GrammarError
from ._calls import Tool
from ._constraint import ReplyConstraint
from ._masks import masked
from ._processor import ConstraintProcessor
from ._protocol import Constraint, not_allowed
from ._rules import ReplyRules, Shape
from ._sources import ANY_OBJECT, Kind, Source

__all__ = [
    "ANY_OBJECT",
    "Constraint",
    "ConstraintProcessor",
    "GrammarError",
    "Kind",
    "ReplyConstraint",
    "ReplyRules",
    "Shape",
    "Source",
    "Tool",
    "masked",
    "not_allowed",
]
