"""Taking back what a forward pass did to a cache."""

from ._recurrence import Tape, has_known_recurrence, prepare_recurrence, recorder
from ._sharing import own_rows, share_rows
from ._transaction import Transaction, check_entries

__all__ = [
    "Tape",
    "Transaction",
    "check_entries",
    "has_known_recurrence",
    "own_rows",
    "prepare_recurrence",
    "recorder",
    "share_rows",
]
