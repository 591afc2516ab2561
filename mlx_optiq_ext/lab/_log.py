"""The lines of a server's log."""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from typing import Any

MAX_LINES = 2000
MAX_CHARACTERS = 4000
# What this room itself asks is not worth a line.
OWN_REQUESTS = ('"GET /metrics HTTP/1.1" 200', '"GET /health HTTP/1.1" 200')
# As the server logs a request that is over.
REQUEST = re.compile(
    r"INFO - (?P<route>/\S*) (?P<status>\d+): (?P<prompt>\d+) prompt tokens "
    r"\((?P<cached>\d+) cached\), (?P<generated>\d+) generated, (?P<speed>[\d.]+) "
    r"tokens/s, draft_n (?P<drafted>\d+), accepted (?P<accepted>\d+)"
)

Line = dict[str, Any]


class Log:
    """The last lines, each with its number, its time and the request it is about."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque(maxlen=MAX_LINES)
        self._numbers = itertools.count()

    def add(self, text: str) -> Line | None:
        """Keep a line, in part if it is long, unless a request of the Lab caused it."""
        if any(request in text for request in OWN_REQUESTS):
            return None
        text = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
        line: Line = {"number": next(self._numbers), "time": time.time(), "text": text}
        if (request := find_request(text)) is not None:
            line["request"] = request
        self.lines.append(line)
        return line

    def last(self, number: int) -> list[str]:
        """The text of the last lines."""
        return [line["text"] for line in self.lines][-number:]


def find_request(text: str) -> dict[str, Any] | None:
    """The request that a line is about, if it is over."""
    match = REQUEST.search(text)
    if match is None:
        return None
    numbers = {k: float(v) for k, v in match.groupdict().items() if k != "route"}
    return {"route": match["route"], **numbers}
