"""Makes a table of the replies of decoders."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOLERANCE = 1e-3  # of logits, whose rounding differs between passes of unlike length
HEADER = (
    "| | tok/s | to plain mlx-lm | CPU ms a token | acceptance | "
    "output of plain mlx-lm | cache at the limit | cache at a stop |"
)


class Contender(NamedTuple):
    """One way to decode.

    Args:
        name (str): The name in the table.
        module (str): The module that its process runs.
        num_draft_tokens (int): The number of draft tokens, 0 for plain decoding.
    """

    name: str
    module: str
    num_draft_tokens: int


REFERENCE = Contender("mlx-lm, plain", "ours", 0)


def contenders(depths: Sequence[int]) -> list[Contender]:
    """List the ways to decode at these numbers of draft tokens, reference first."""
    names = {"ours": "mlx-optiq-ext", "vlm": "mlx-vlm", "optiq": "mlx-optiq"}
    plain = [
        Contender(f"{names[module]}, plain", module, 0) for module in ("vlm", "optiq")
    ]
    return [
        REFERENCE,
        *plain,
        *(
            Contender(f"{name}, depth {depth}", module, depth)
            for depth in depths
            for module, name in names.items()
        ),
    ]


@dataclass
class Results:
    """The outcome of one contender's runs.

    Args:
        seconds (dict): The seconds of each timed run, from the first token to the last,
          by prompt.
        processor_seconds (dict): The seconds of the processor in the same runs.
        tokens (dict): The tokens of the last run, by prompt.
        drafted (int): The draft tokens of all timed runs, as the decoder counts them.
        accepted (int): The number of them that were accepted.
        caches (dict): What ``inspect`` found, at the limit and at a stop.
        error (str, optional): The reason why there is no outcome.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    processor_seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    caches: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"limit": [], "stop": []}
    )
    error: str | None = None

    def add_run(self, prompt: int, reply: dict[str, Any]) -> None:
        if (error := reply.get("error")) is not None:
            self.error = error
            return
        self.seconds.setdefault(prompt, []).append(reply["seconds"])
        own = self.processor_seconds.setdefault(prompt, [])
        own.append(reply["processor_seconds"])
        self.tokens[prompt] = reply["tokens"]
        self.drafted += reply["drafted"]
        self.accepted += reply["accepted"]

    def add_cache(self, ending: str, reply: dict[str, Any]) -> None:
        if (error := reply.get("error")) is not None:
            self.error = error
        else:
            self.caches[ending].append(reply["cache"])

    def speed(self, prompt: int) -> float:
        """Compute the tokens a second, without the first, which the prompt yields."""
        num_tokens = len(self.tokens[prompt]) - 1
        return num_tokens / statistics.median(self.seconds[prompt])

    def cost(self, prompt: int) -> float:
        """Compute the milliseconds of the processor per token."""
        num_tokens = len(self.tokens[prompt]) - 1
        return 1e3 * statistics.median(self.processor_seconds[prompt]) / num_tokens


def table(results: dict[Contender, Results], is_greedy: bool) -> str:
    """Lay the results out as Markdown, a row for each contender."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    reference = results[REFERENCE]
    for contender, found in results.items():
        cells = (
            [f"cannot run: {found.error}", *[""] * 6]
            if found.error is not None
            else _cells(found, reference, is_greedy)
        )
        lines.append(f"| {contender.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(found: Results, reference: Results, is_greedy: bool) -> list[str]:
    prompts = list(found.seconds)
    speed = statistics.geometric_mean(found.speed(prompt) for prompt in prompts)
    ratio = statistics.geometric_mean(
        found.speed(prompt) / reference.speed(prompt) for prompt in prompts
    )
    cost = statistics.geometric_mean(map(found.cost, prompts))
    rate = f"{found.accepted / found.drafted:.1%}" if found.drafted else ""
    same = agreement(found.tokens, reference.tokens) if is_greedy else "sampled"
    caches = [verdict(found.caches[ending]) for ending in ("limit", "stop")]
    return [f"{speed:.0f}", f"{ratio:.2f}x", f"{cost:.2f}", rate, same, *caches]


def agreement(found: dict[int, list[int]], expected: dict[int, list[int]]) -> str:
    """Say for how many prompts the tokens are equal, and where the first differs."""
    differences = [
        first_difference(tokens, expected[prompt])
        for prompt, tokens in found.items()
        if tokens != expected[prompt]
    ]
    if not differences:
        return "identical"
    num_same = len(found) - len(differences)
    return f"{num_same} of {len(found)}, else from token {min(differences)} on"


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Find the position of the first token that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def verdict(caches: Sequence[dict[str, Any]]) -> str:
    """Say what is wrong with the caches of several runs, or that they are right."""
    kinds = {_kind(**cache) for cache in caches}
    return "; ".join(sorted(kinds - {"right"})) or "right"


def _kind(num_extra: int, error: float | None) -> str:
    if num_extra > 0:
        return f"{num_extra} too many"
    if error is None or not error < TOLERANCE:
        return "wrong"
    return f"{-num_extra} missing" if num_extra else "right"
