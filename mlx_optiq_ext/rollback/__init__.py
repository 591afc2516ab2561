"""Taking back what a forward pass did to a cache."""

from ._sharing import own_rows, share_rows
from ._tape import Tape, can_tape
from ._transaction import Transaction, marks

__all__ = ["Tape", "Transaction", "can_tape", "marks", "own_rows", "share_rows"]
