"""Taking back what a forward pass did to a cache."""

from ._apart import attend_apart, rows_are_apart, update_in_order
from ._batch import Batch
from ._recurrence import Tape, has_known_recurrence, prepare_recurrence, recorder
from ._sharing import own_rows, share_rows
from ._transaction import Transaction, check_entries

__all__ = [
    "Batch",
    "Tape",
    "Transaction",
    "attend_apart",
    "check_entries",
    "has_known_recurrence",
    "own_rows",
    "prepare_recurrence",
    "recorder",
    "rows_are_apart",
    "share_rows",
    "update_in_order",
]
