"""What speculation did, as counts; every rate is derived."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

PER_POSITION = (
    "num_calls_per_depth",
    "num_drafted_per_position",
    "num_accepted_per_position",
)


@dataclass
class SpeculationStats:
    """Counts of one generation.

    A round is one verify pass over at least one draft token. Position 0 is the first
    draft token of a round.

    Args:
        num_tokens (int): Tokens emitted.
        num_target_calls (int): Forward passes of the target that emitted tokens.
        num_rounds (int): Rounds.
        num_calls_per_depth (list[int]): Forward passes by the number of draft tokens in
          them: none, one and so on.
        num_drafted_per_position (list[int]): Draft tokens verified, by position.
        num_accepted_per_position (list[int]): Draft tokens emitted, by position.
        records_sources (bool): Whether ``token_sources`` is kept.
        token_sources (list[str | None]): What proposed each token that was emitted,
          such as ``"mtp"``; None for one of the target's own. A token is added before
          whoever consumes it can see it.
    """

    num_tokens: int = 0
    num_target_calls: int = 0
    num_rounds: int = 0
    num_calls_per_depth: list[int] = field(default_factory=list)
    num_drafted_per_position: list[int] = field(default_factory=list)
    num_accepted_per_position: list[int] = field(default_factory=list)
    records_sources: bool = False
    token_sources: list[str | None] = field(default_factory=list)

    def add_round(self, num_drafted: int) -> None:
        self.num_target_calls += 1
        self.num_rounds += num_drafted > 0
        self.num_calls_per_depth += [0] * (
            num_drafted + 1 - len(self.num_calls_per_depth)
        )
        self.num_calls_per_depth[num_drafted] += 1
        missing = num_drafted - len(self.num_drafted_per_position)
        self.num_drafted_per_position += [0] * missing
        self.num_accepted_per_position += [0] * missing
        for position in range(num_drafted):
            self.num_drafted_per_position[position] += 1

    def add_token(self, accepted_position: int | None, source: str) -> None:
        """Count a token that is about to be emitted.

        Args:
            accepted_position (int, optional): Its position among the draft tokens of
              the round; None for a token of the target's own.
            source (str): What proposes draft tokens.
        """
        self.num_tokens += 1
        if self.records_sources:
            self.token_sources.append(None if accepted_position is None else source)
        if accepted_position is not None:
            self.num_accepted_per_position[accepted_position] += 1

    @classmethod
    def total(cls, parts: Iterable[SpeculationStats]) -> SpeculationStats:
        """The counts of several generations together."""
        found = cls()
        for part in parts:
            found.num_tokens += part.num_tokens
            found.num_target_calls += part.num_target_calls
            found.num_rounds += part.num_rounds
            for name in PER_POSITION:
                pairs = zip_longest(
                    getattr(found, name), getattr(part, name), fillvalue=0
                )
                setattr(found, name, [one + other for one, other in pairs])
        return found

    @property
    def num_drafted(self) -> int:
        return sum(self.num_drafted_per_position)

    @property
    def num_accepted(self) -> int:
        return sum(self.num_accepted_per_position)

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens over draft tokens verified."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Accepted over verified, for each position of the draft."""
        pairs = zip(
            self.num_accepted_per_position, self.num_drafted_per_position, strict=True
        )
        return [num_accepted / num_drafted for num_accepted, num_drafted in pairs]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per round, the recovered or bonus token included."""
        return 1 + self.num_accepted / max(self.num_rounds, 1)

    def __str__(self) -> str:
        calls = ", ".join(map(str, self.num_calls_per_depth))
        return (
            f"{self.num_rounds} rounds, calls by depth {calls}, "
            f"{self.mean_accepted_length:.3f} tokens-per-round, "
            f"{self.num_accepted} of {self.num_drafted} draft tokens accepted "
            f"({self.acceptance_rate:.1%})"
        )
