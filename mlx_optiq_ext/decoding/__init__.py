"""The speculative decode loop."""

from ._generation import Token
from ._generator import SpeculativeBatchGenerator
from ._sequence import SequenceOptions
from ._statistics import SpeculationStats
from ._step import spec_generate_step

__all__ = [
    "SequenceOptions",
    "SpeculationStats",
    "SpeculativeBatchGenerator",
    "Token",
    "spec_generate_step",
]
