"""Taking back what a forward pass did to a cache."""

from ._apart import attend_apart, rows_are_apart, update_in_order
from ._batch import Batch
from ._recurrence import Tape, has_known_recurrence, prepare_recurrence, recorder
from ._rows import MAX_ROWS, RowStates, can_keep_rows, mix_rows
from ._sharing import own_rows, share_rows
from ._transaction import Transaction, check_entries

__all__ = [
    "MAX_ROWS",
    "Batch",
    "RowStates",
    "Tape",
    "Transaction",
    "attend_apart",
    "can_keep_rows",
    "check_entries",
    "has_known_recurrence",
    "mix_rows",
    "own_rows",
    "prepare_recurrence",
    "recorder",
    "rows_are_apart",
    "share_rows",
    "update_in_order",
]
