"""Anthropic Messages: https://docs.anthropic.com/en/api/messages."""

from ._reply import MessageReply
from ._request import read_request

__all__ = ["MessageReply", "read_request"]
