"""Compiles large grammars on trial first, in a process that is ended if it takes long.

llguidance has limits of its own for almost everything. What it computes without one is
the remainders of ``multipleOf`` and how very many properties may follow each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from hashlib import sha256

from .._errors import GrammarError

SMALL = 10_000  # characters, within which nothing but remainders takes long
MAX_CPU_SECONDS = 3
MAX_BYTES = 1 << 30
# For a machine that has no time; the seconds of the processor are what counts.
MAX_SECONDS = 60.0
MAX_KNOWN = 1000

PROGRAM = f"""
import resource, sys
for kind, limit in (("CPU", {MAX_CPU_SECONDS}), ("AS", {MAX_BYTES})):
    kind = getattr(resource, "RLIMIT_" + kind)
    try:
        resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError):
        pass
import llguidance
grammar, tokenizer = sys.stdin.read(), llguidance.LLTokenizer("byte")
llguidance.LLMatcher(tokenizer, grammar, log_level=0).compute_bitmask()
"""

# The hashes of grammars that passed, the latest last.
_known: OrderedDict[bytes, None] = OrderedDict()


def check_cost(grammar: str) -> None:
    """Find out whether a grammar can be compiled within three seconds and a gigabyte.

    Args:
        grammar (str): As llguidance takes it. It may be malformed.

    Raises:
        GrammarError: If it cannot.
    """
    if len(grammar) < SMALL and "multipleOf" not in grammar:
        return
    key = sha256(grammar.encode()).digest()
    if key in _known:
        return
    if not _can_be_compiled(grammar):
        raise GrammarError("the grammar is too complex")
    _known[key] = None
    while len(_known) > MAX_KNOWN:
        _known.popitem(last=False)


def _can_be_compiled(grammar: str) -> bool:
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "MLX_OPTIQ_EXT": "0"}
    try:
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=grammar,
            encoding="utf-8",
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0
