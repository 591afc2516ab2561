"""The speculative decode loop."""

from ._statistics import SpeculationStats
from ._step import spec_generate_step

__all__ = ["SpeculationStats", "spec_generate_step"]
