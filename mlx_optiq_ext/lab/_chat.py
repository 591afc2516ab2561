"""Passes a request of the chat page on to the server, and its reply back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ._answers import problem
from ._launch import Launch

NOT_READY = "no server is ready: start one on the Server page"
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
    """A reply of the server, as an application that passes it on to a page.

    It is ended when the page leaves, which may be before it has begun.

    Args:
        client (AsyncClient): To ask with.
        launch (Launch): Of the server.
        request (dict): Of ``read_request``.

    Raises:
        ValueError: If the request cannot be expressed as JSON.
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = asyncio.create_task(self._pass_on(scope, receive, send))
        leaving = asyncio.create_task(_has_left(receive))
        tasks = {passing, leaving}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not passing.cancelled():
            passing.result()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._client.send(self._request, stream=True)
        except httpx2.TransportError:
            await problem(409, NOT_READY)(scope, receive, send)
            return
        async with contextlib.aclosing(response):
            kind = response.headers.get("content-type", "text/plain")
            parts = _parts(response)
            answer = StreamingResponse(parts, response.status_code, media_type=kind)
            await answer.stream_response(send)


async def _parts(response: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx2.TransportError:
        yield b'data: {"error": {"message": "the server ended in between"}}\n\n'


async def _has_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
