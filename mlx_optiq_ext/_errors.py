"""The one exception of this package."""


class SpeculationError(ValueError):
    """Speculation was asked for and cannot be done; the message says why."""
