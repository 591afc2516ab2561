"""Commands that are shown to be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """A command line of these words, those with spaces and the like in quotes."""
    return shlex.join(map(str, words))
