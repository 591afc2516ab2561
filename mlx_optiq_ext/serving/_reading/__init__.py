"""Reads the text of a reply: thoughts, the answer, and calls of tools."""

from ._format import ReplyFormat
from ._reader import Reading, Response, read_reply

__all__ = ["Reading", "ReplyFormat", "Response", "read_reply"]
