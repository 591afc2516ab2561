"""OpenAI chat completions and completions, with mlx-lm's extensions of them."""

from ._chat_reply import ChatReply
from ._chat_request import read_chat_request
from ._request import read_completion_request
from ._text_reply import TextReply

__all__ = ["ChatReply", "TextReply", "read_chat_request", "read_completion_request"]
