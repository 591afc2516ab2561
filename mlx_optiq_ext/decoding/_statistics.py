"""Counts what speculation does; every rate is derived from the counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

PER_POSITION = (
    "num_calls_per_depth",
    "num_drafted_per_position",
    "num_accepted_per_position",
)

PER_SOURCE = ("num_drafted_per_source", "num_accepted_per_source")


@dataclass
class SpeculationStats:
    """The counts of one generation.

    A round is one verify pass over at least one draft token. Position 0 is the first
    draft token of a round.

    Args:
        num_tokens (int): The number of tokens emitted.
        num_target_calls (int): The number of forward passes of the target that emitted
          tokens.
        num_rounds (int): The number of rounds.
        num_calls_per_depth (list[int]): The number of forward passes, by how many draft
          tokens they verified, from none on.
        num_drafted_per_position (list[int]): The number of draft tokens verified, by
          position.
        num_accepted_per_position (list[int]): The number of draft tokens emitted, by
          position.
        num_drafted_per_source (dict[str, int]): The number of draft tokens verified, by
          what proposed them, such as ``"mtp"`` or ``"prompt_lookup"``.
        num_accepted_per_source (dict[str, int]): The number of draft tokens emitted, by
          what proposed them.
        records_sources (bool): Whether ``token_sources`` is kept.
        token_sources (list[str | None]): The name of what proposed each emitted token,
          such as ``"mtp"``, or None for a token of the target's own. An item is added
          before the consumer receives the token.
    """

    num_tokens: int = 0
    num_target_calls: int = 0
    num_rounds: int = 0
    num_calls_per_depth: list[int] = field(default_factory=list)
    num_drafted_per_position: list[int] = field(default_factory=list)
    num_accepted_per_position: list[int] = field(default_factory=list)
    num_drafted_per_source: dict[str, int] = field(default_factory=dict)
    num_accepted_per_source: dict[str, int] = field(default_factory=dict)
    records_sources: bool = False
    token_sources: list[str | None] = field(default_factory=list)

    def add_round(self, num_drafted: int, source: str | None = None) -> None:
        """Count a forward pass of the target.

        Args:
            num_drafted (int): The number of draft tokens that it verified.
            source (str, optional): The name of what proposed them.
        """
        if num_drafted and source is not None:
            before = self.num_drafted_per_source.get(source, 0)
            self.num_drafted_per_source[source] = before + num_drafted
            self.num_accepted_per_source.setdefault(source, 0)
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

    def add_token(
        self, accepted_position: int | None, source: str | None = None
    ) -> None:
        """Count a token that is about to be emitted.

        Args:
            accepted_position (int, optional): The token's position among the draft
              tokens of the round. None if it is the target's own.
            source (str, optional): The name of what proposed the draft tokens.
        """
        self.num_tokens += 1
        if self.records_sources:
            self.token_sources.append(None if accepted_position is None else source)
        if accepted_position is None:
            return
        self.num_accepted_per_position[accepted_position] += 1
        if source is not None:
            self.num_accepted_per_source[source] += 1

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
            for name in PER_SOURCE:
                counts, numbers = getattr(found, name), getattr(part, name)
                for source, number in list(numbers.items()):
                    counts[source] = counts.get(source, 0) + number
        return found

    @property
    def num_drafted(self) -> int:
        return sum(self.num_drafted_per_position)

    @property
    def num_accepted(self) -> int:
        return sum(self.num_accepted_per_position)

    @property
    def acceptance_rate(self) -> float:
        """The number of draft tokens accepted, divided by the number verified."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """The acceptance rate of each position of the draft."""
        pairs = zip(
            self.num_accepted_per_position, self.num_drafted_per_position, strict=True
        )
        return [num_accepted / num_drafted for num_accepted, num_drafted in pairs]

    @property
    def mean_accepted_length(self) -> float:
        """The mean number of tokens per round, with the recovered or bonus token."""
        return 1 + self.num_accepted / max(self.num_rounds, 1)

    def __str__(self) -> str:
        calls = ", ".join(map(str, self.num_calls_per_depth))
        return (
            f"{self.num_rounds} rounds, calls by depth {calls}, "
            f"{self.mean_accepted_length:.3f} tokens-per-round, "
            f"{self.num_accepted} of {self.num_drafted} draft tokens accepted "
            f"({self.acceptance_rate:.1%}){self._sources()}"
        )

    def _sources(self) -> str:
        """The shares of the sources, where there are several."""
        drafted, accepted = self.num_drafted_per_source, self.num_accepted_per_source
        if len(drafted) < 2:
            return ""
        parts = (f"{name} {accepted[name]} of {drafted[name]}" for name in drafted)
        return f": {', '.join(parts)}"
