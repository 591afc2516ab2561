"""What a client asks for, whichever API it asks by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from mlx_lm import server

from ..grammars import Source
from ._conversation import Message, tool_name
from ._errors import bad_request
from ._fields import checked, choice, number, optional
from ._images import has_images
from ._reading import ReplyFormat

Body = dict[str, Any]
Tool = dict[str, Any]

# For APIs whose clients expect that a reply gets as long as it is.
MAX_TOKENS = 32768
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Tokens that a thought may have, by the effort that is asked for; more is not limited.
# The numbers are those of Google's API.
EFFORT_TOKENS = {"low": 1024, "medium": 8192, "high": 24576}


@dataclass
class Request(server.CompletionRequest):
    """A request for replies, which mlx-lm takes for one of its own.

    Args:
        request_type: "chat" for messages, "text" for a prompt.
        prompt: A text, or the ids of its tokens.
        messages: As a chat template takes them.
        tools: As a chat template takes them, None if there are none.
        role_mapping: The names of the roles where there is no chat template.
        model: The id that the client uses, None if it does not say.
        body: The JSON object, for the fields that all APIs have in common.
        is_streamed: The reply is sent in pieces.
        must_call: The reply has to be a call of a tool.
        strict_tools: Names of those whose arguments have to follow their schemas.
        one_call: The reply is over after its first call.
        prefill: How the reply has to begin.
        max_tokens: None for the server's default, 0 to fill the cache only.
        least_max_tokens: What that default is at least.
        stop: Stop sequences.
        template: Further arguments of the chat template.
        has_thinking: Whether thinking is asked for, None if that is left open.
        thinks_by_default: What an open question means, unless the server's own
            template arguments decide it.
        num_choices: Replies to generate.
        gives_logprobs: Whether the log probabilities of tokens are asked for.
        num_top_logprobs: Alternatives to each token that are asked for.
        gives_sources: Whether it is asked who drafted each token.
        keeps_space: White space is sent exactly as it is generated.
        counts_only: The prompt is tokenised and no more.
        answer: The grammar that the answer has to follow, None if there is none.
        answer_path: The field that asks for it.
        max_thinking_tokens: Tokens that a thought may have, None for no limit.
        takes_images: The model has to take images, whether or not there are any.
        is_cut_by_context: Set by the generation thread, when the context is what
            limits the reply.
        tokenizer: Set by the generation thread: the one of the model.
        format: Set by the generation thread: the markers of the model, None for a
            "text", whose markers are part of it.
        initial_state: Set by the generation thread: what the reply begins with.
    """

    request_type: str = "chat"
    prompt: str | list[int] = ""
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] | None = None
    role_mapping: dict[str, Any] | None = None
    model: str | None = None
    body: Body = field(default_factory=dict)
    is_streamed: bool = False
    must_call: bool = False
    strict_tools: frozenset[str] = frozenset()
    one_call: bool = False
    prefill: str = ""
    max_tokens: int | None = None
    least_max_tokens: int = 0
    stop: tuple[str, ...] = ()
    template: dict[str, Any] = field(default_factory=dict)
    has_thinking: bool | None = None
    thinks_by_default: bool = True
    num_choices: int = 1
    gives_logprobs: bool = False
    num_top_logprobs: int = 0
    gives_sources: bool = False
    keeps_space: bool = False
    counts_only: bool = False
    answer: Source | None = None
    answer_path: str = ""
    max_thinking_tokens: int | None = None
    takes_images: bool = False
    is_cut_by_context: bool = False
    tokenizer: Any = None
    format: ReplyFormat | None = None
    initial_state: str = "normal"

    @property
    def fills_cache_only(self) -> bool:
        return self.max_tokens == 0

    @property
    def has_images(self) -> bool:
        return has_images(self.messages)

    def choose_tools(
        self, mode: str, tools: list[Tool], strict: Collection[str] = ()
    ) -> None:
        """Offer the tools as a client wants them to be used.

        Args:
            mode (str): "auto", "none" or "required".
            tools (list[dict]): Those that may be called.
            strict (Collection[str]): Names of those that are strict.

        Raises:
            APIError: 400, if there has to be a call and there is no tool.
        """
        self.must_call = mode == "required"
        if self.must_call and not tools:
            raise bad_request(
                "tool_choice: a call needs a tool to call", param="tool_choice"
            )
        self.tools = tools if tools and mode != "none" else None
        names = map(tool_name, self.tools or ())
        self.strict_tools = frozenset(names).intersection(strict)

    def limit_thinking(self, num_tokens: int | None) -> None:
        """Let a thought have so many tokens, unless a client said how many."""
        if self.max_thinking_tokens is None:
            self.max_thinking_tokens = num_tokens

    def choose_effort(self, effort: str, path: str) -> None:
        """Think as hard as a client wants, which for the least is not at all.

        Raises:
            APIError: 400, if that is no effort.
        """
        choice(effort, EFFORTS, path)
        self.limit_thinking(EFFORT_TOKENS.get(effort))
        self.template["reasoning_effort"] = effort
        self.has_thinking = effort not in ("none", "minimal")


def read_stop(body: Body, name: str) -> tuple[str, ...]:
    """The stop sequences of a request: one, or a list of them.

    Raises:
        APIError: 400, if one is no text or has no characters.
    """
    stop = optional(body, name, (str, list), [])
    for index, sequence in enumerate(stop if isinstance(stop, list) else []):
        path = f"{name}.{index}"
        if not checked(sequence, str, path):
            raise bad_request(f"{path}: must not be empty", param=path)
    if isinstance(stop, str):
        return (stop,) if stop else ()
    return tuple(stop)


def read_num_top_logprobs(body: Body) -> int:
    """Alternatives to each token that a request asks for.

    Raises:
        APIError: 400, if it is no number of them that can be had.
    """
    found = number(body, "top_logprobs", 0, least=-1, most=MAX_TOP_LOGPROBS, kind=int)
    return max(found, 0)  # mlx-lm's own default is -1.


def refuse_choices(body: Body) -> None:
    """Refuse to answer with more than one reply where an API has room for one.

    Raises:
        APIError: 400.
    """
    if number(body, "n", 1, kind=int) != 1:
        raise bad_request("n: not supported here", "n", "unsupported_parameter")


def refuse(body: Body, *names: str) -> None:
    """Refuse fields that would change the reply and are not supported.

    Raises:
        APIError: 400, with the first that is there.
    """
    for name in names:
        if body.get(name):
            raise bad_request(
                f"{name}: not supported here", name, "unsupported_parameter"
            )
