"""How a model marks thoughts and calls, and in which format it writes calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ._calls import CallReader, NotACallError
from ._gemma_calls import CALL as GEMMA_CALL
from ._gemma_calls import read_gemma
from ._json_calls import read_json
from ._source import EndOfText, Steps
from ._whole_calls import Parser, read_whole
from ._xml_calls import CALL as XML_CALL
from ._xml_calls import read_xml

# The formats of mlx-lm's parsers that are read while they are written. A model that
# knows one of them sometimes writes another.
STREAMED = ("json_tools", "qwen3_coder", "gemma4")
OPENINGS = {"{": read_json, "[": read_json, XML_CALL: read_xml, GEMMA_CALL: read_gemma}

Transitions = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class ReplyFormat:
    """The markers of a model.

    Args:
        transitions (dict): For each state the markers that end it, and the state that
          follows: "normal", "reasoning", "tool", or a part that nobody is shown.
        call_end (str): The marker after calls, "" if there is none.
        parser (Callable, optional): mlx-lm's, which reads the text of calls.
        think_end (str, optional): The marker after thoughts.
    """

    transitions: Transitions = field(default_factory=dict)
    call_end: str = ""
    parser: Parser | None = None
    think_end: str | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> ReplyFormat:
        """The markers that a tokenizer of mlx-lm knows."""
        return cls(
            _transitions(tokenizer),
            tokenizer.tool_call_end or "",
            tokenizer.tool_parser,
            tokenizer.think_end,
        )

    def read_call(self, calls: CallReader) -> Steps[None]:
        """Read one call, or what the parser of another format makes of the text.

        Raises:
            NotACallError: If it is none.
            EndOfText: If it is not complete.
        """
        yield from calls.source.skip_space()
        if _parser_name(self.parser) not in STREAMED:
            yield from read_whole(calls, self.parser)
            return
        opening = yield from calls.source.next_is(*OPENINGS)
        if not opening:
            raise EndOfText if calls.source.is_over else NotACallError
        calls.source.back(len(opening))
        yield from OPENINGS[opening](calls)


def _parser_name(parser: Parser | None) -> str:
    return getattr(parser, "__module__", "").removeprefix("mlx_lm.tool_parsers.")


def _transitions(tokenizer: Any) -> Transitions:
    """The transitions that mlx-lm's server makes for a tokenizer."""
    own: Transitions = getattr(tokenizer, "response_transitions", {})
    transitions: Transitions = {"normal": [], "reasoning": []}
    if tokenizer.has_thinking:
        transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"].append((tokenizer.think_end, "normal"))
    if tokenizer.has_tool_calling:
        # A template's own transitions decide where calls start.
        starts = [(tokenizer.tool_call_start, "tool")]
        if _parser_name(tokenizer.tool_parser) == "qwen3_coder":
            # Qwen3-Coder forgets the first marker now and then.
            starts.append((XML_CALL, "tool"))
        if all(
            next_state != "tool" for edges in own.values() for _, next_state in edges
        ):
            transitions["normal"] += starts
        if tokenizer.has_thinking:
            transitions["reasoning"] += starts
    for marker in getattr(tokenizer, "structural_markers", ()):
        transitions["normal"].append((marker, "normal"))
    for state, edges in own.items():
        transitions.setdefault(state, []).extend(edges)
    return transitions
