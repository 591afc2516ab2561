"""Taking back what a forward pass did to a cache."""

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
    "can_keep_rows",
    "check_entries",
    "has_known_recurrence",
    "mix_rows",
    "own_rows",
    "prepare_recurrence",
    "recorder",
    "share_rows",
]
