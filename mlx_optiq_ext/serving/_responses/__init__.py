"""OpenAI Responses: https://platform.openai.com/docs/api-reference/responses."""

from ._items import page
from ._reply import ResponseReply
from ._request import ResponseRequest, read_request

__all__ = ["ResponseReply", "ResponseRequest", "page", "read_request"]
