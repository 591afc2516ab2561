"""Writes replies of completions."""

from __future__ import annotations

from typing import Any

from .._events import End, Event, Text, Token
from ._reply import FINISH_REASONS, CompletionReply

Body = dict[str, Any]


class TextReply(CompletionReply):
    """Texts that continue a prompt."""

    PREFIX = "cmpl"
    KIND = PIECE_KIND = "text_completion"

    def begin(self) -> Body:
        self._offset = 0
        fields: Body = {"logprobs": {}} if self._request.gives_logprobs else {}
        return fields | {"text": ""}

    def write(self, choice: Body, event: Event) -> Body | None:
        if not isinstance(event, Text):
            return None
        choice["text"] += event.text
        return {"text": event.text}

    def end(self, choice: Body, end: End) -> Body:
        choice["finish_reason"] = FINISH_REASONS[end.reason]
        return {"text": ""}

    def logprobs(self, choice: Body, tokens: list[Token]) -> Body:
        """In the form of this API, and beside it in the one of chat completions."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return super().logprobs(choice, tokens) | {
            "tokens": [token.spelling for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }
