"""Passes a request of the chat page on to the server, and its reply back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from ._launch import Launch

ROLES = ("system", "user", "assistant", "tool")
# Others could name a model, an adapter or a file.
FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "seed",
    "num_draft_tokens",
    "tools",
    "chat_template_kwargs",
)
OWN_FIELDS = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "token_sources": True,
}


def read_request(body: Any) -> dict[str, Any]:
    """The request for the server that a page means.

    Args:
        body: From JSON.

    Raises:
        ValueError: If it is not a conversation.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise ValueError("expected an object with messages")
    messages = [_message(message) for message in body["messages"]]
    given = {k: body[k] for k in FIELDS if body.get(k) is not None}
    return {"messages": messages, **given, **OWN_FIELDS}


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"expected a message with a role, one of {', '.join(ROLES)}")
    # Parts could point to images, which the server would fetch.
    if not isinstance(message.get("content", ""), str):
        raise ValueError("expected the content of a message to be text")
    keys = ("role", "content", "tool_calls", "tool_call_id")
    return {key: message[key] for key in keys if message.get(key) is not None}


class Reply:
    """A reply of the server, as it comes.

    Args:
        client (AsyncClient): To ask with.
        launch (Launch): Of the server.
        request (dict): Of ``read_request``.
    """

    def __init__(
        self, client: httpx2.AsyncClient, launch: Launch, request: Mapping[str, Any]
    ):
        self._client = client
        self._request = client.build_request(
            "POST",
            f"{launch.url}/v1/chat/completions",
            json=request,
            headers=launch.headers,
        )
        self._response: httpx2.Response | None = None

    async def open(self) -> tuple[int, str]:
        """Wait for the head of the reply.

        Returns:
            tuple: The status and the type of the content.

        Raises:
            TransportError: If there is no server any more.
        """
        self._response = await self._client.send(self._request, stream=True)
        content_type = self._response.headers.get("content-type", "text/plain")
        return self._response.status_code, content_type

    async def read(self) -> AsyncIterator[bytes]:
        """The parts of the reply; a reader that leaves ends the request."""
        assert self._response is not None
        try:
            async for part in self._response.aiter_raw():
                yield part
        except httpx2.TransportError:
            yield b'data: {"error": {"message": "the server ended in between"}}\n\n'
        finally:
            await self._response.aclose()
