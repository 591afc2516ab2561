"""The flags of the server that a page may set, as the server's own help lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ._process import Child

HELP = ("mlx_lm.server", "--help")
# Flags that have a control of their own on the page.
OWN = {
    "--model",
    "--host",
    "--port",
    "--api-key",
    "--mtp",
    "--draft",
    "--draft-model",
    "--num-draft-tokens",
    "--draft-vocab",
    "--recommended-sampling",
    "--temp",
    "--top-p",
    "--top-k",
    "--min-p",
}
# The others are offered if their help is about one of these. What takes a path or a
# template is not: nothing that a page sends may name a file.
SUBJECT = re.compile(
    r"\b(speculat\w*|draft\w*|lookup|copy\w*|prompt cache|KV cache\w*|prefill|"
    r"tokens to generate|in parallel)\b",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"^  (?:-\w+, )?(?P<name>--[a-z][\w-]*)(?: (?P<value>\{[^}]*\}|\[?[A-Z][\w|]*\]?))?"
    r"(?:  +(?P<text>.*))?$"
)
INDENT = " " * 8
NAMES_A_FILE = re.compile(r"PATH|FILE|DIR|FOLDER|TEMPLATE|MODEL|ARGS|ORIGINS|HOST")
NUMBER = re.compile(r"\d{1,15}(\.\d{1,9})?(|[KMGkmg][Bb]?)")


@dataclass(frozen=True)
class Flag:
    """A flag of the server.

    Args:
        name (str): With its dashes.
        value (str, optional): What the help calls its value, None for a switch.
        choices (tuple): The values that it takes, empty if they are numbers.
        text (str): Its help.
    """

    name: str
    value: str | None
    choices: tuple[str, ...]
    text: str

    def arguments(self, given: Any) -> list[str]:
        """This flag on a command line.

        Args:
            given: What a page sent for it.

        Raises:
            ValueError: If it is no value of the flag.
        """
        if self.value is None:
            if not isinstance(given, bool):
                raise ValueError(f"{self.name}: expected true or false, got {given!r}")
            return [self.name] if given else []
        text = str(given).strip()
        if not text:
            return []
        if text not in self.choices and (self.choices or not NUMBER.fullmatch(text)):
            expected = ", ".join(self.choices) or "a number"
            raise ValueError(f"{self.name}: expected {expected}, got {given!r}")
        return [self.name, text]


async def ask_for_flags() -> dict[str, Flag]:
    """What the server on this machine offers, besides what has its own control."""
    lines: list[str] = []
    async with Child.running(HELP, lambda line: None, lines.append) as child:
        await child.wait()
    return {flag.name: flag for flag in read_flags(lines)}


def read_flags(lines: Iterable[str]) -> list[Flag]:
    """The flags in a help text that a page may set."""
    found = []
    for line in _unwrapped(lines):
        match = OPTION.match(line)
        if match and _is_offered(match["name"], match["value"], match["text"] or ""):
            found.append(_flag(match["name"], match["value"], match["text"] or ""))
    return found


def _unwrapped(lines: Iterable[str]) -> list[str]:
    """The lines, with the text that is below a long flag beside it."""
    found: list[str] = []
    for line in lines:
        if line.startswith(INDENT) and found:
            found[-1] += f"  {line.strip()}"
        else:
            found.append(line)
    return found


def _is_offered(name: str, value: str | None, text: str) -> bool:
    if name in OWN or (value and NAMES_A_FILE.search(value)):
        return False
    return SUBJECT.search(text) is not None


def _flag(name: str, value: str | None, text: str) -> Flag:
    is_choice = value is not None and value.startswith("{")
    choices = tuple(value.strip("{}").split(",")) if value and is_choice else ()
    return Flag(name, value, choices, text)
