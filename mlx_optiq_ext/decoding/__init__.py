"""The speculative decode loop."""

from ._batch import SequenceOptions, SpeculativeBatch
from ._decoder import Token
from ._statistics import SpeculationStats
from ._step import spec_generate_step

__all__ = [
    "SequenceOptions",
    "SpeculationStats",
    "SpeculativeBatch",
    "Token",
    "spec_generate_step",
]
