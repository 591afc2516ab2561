"""Writes commands that users can paste into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """Join words to a command line, and quote them where a shell needs it."""
    return shlex.join(map(str, words))
