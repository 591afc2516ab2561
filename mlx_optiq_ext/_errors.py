"""The one exception of this package."""


class SpeculationError(ValueError):
    """Is raised if speculation is asked for and impossible; the message says why."""
