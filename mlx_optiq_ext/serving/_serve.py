"""Generates the reply to a chat and sends it, streamed or in one piece."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ._chat import Chat
from ._errors import APIError, ClientGone
from ._events import End, Event, Usage
from ._exchange import Exchange
from ._explain import explain
from ._fields import optional
from ._generation import ChatRequest, chat_request, generation_arguments, load_images
from ._reply import Splitter, read_reply, trim, with_leading_space

Body = dict[str, Any]


class Reply(Protocol):
    """Writes a reply in the events of one API."""

    def start(self) -> Iterator[Body]: ...

    def feed(self, event: Event) -> Iterator[Body]: ...

    def failure(self, error: APIError) -> Iterator[Body]: ...

    def keep_alive(self) -> Body | None: ...

    def result(self) -> Body: ...


def send_reply(
    exchange: Exchange,
    chat: Chat,
    reply: Reply,
    usage: Usage,
    keep: Callable[[Body], None] = lambda body: None,
) -> None:
    """Generate a reply and send it.

    Args:
        exchange (Exchange): Whom to send it to.
        chat (Chat): What to generate it from.
        reply (Reply): Writes it.
        usage (Usage): Counts its tokens.
        keep (Callable): Called with the whole of it when it is complete.

    Raises:
        APIError: If it failed before anything was sent.
    """
    is_streamed = _is_streamed(chat)
    if is_streamed:
        exchange.open_stream(reply)
    try:
        for body in write_reply(exchange, chat, reply, usage):
            if body["type"] in LAST_EVENTS:
                keep(reply.result())
            if is_streamed:
                exchange.send_event(body)
    except ClientGone:
        raise
    except Exception as exc:
        _fail(exchange, reply, exc)
    else:
        if not is_streamed:
            exchange.send_json(200, reply.result())


# Who has them may ask for the response.
LAST_EVENTS = ("response.completed", "response.incomplete")


def write_reply(
    exchange: Exchange, chat: Chat, reply: Reply, usage: Usage
) -> Iterator[Body]:
    """The events of a reply while it is generated."""
    load_images(exchange.generator, chat)
    request = chat_request(chat)
    arguments = generation_arguments(chat, exchange.cli_args)
    context, responses = exchange.generator.generate(
        request, arguments, progress_callback=_log_progress
    )
    if context.prompt_cache_count < 0:
        # The length of the cached prefix is known as soon as there is a token.
        responses = itertools.chain([next(responses)], responses)
    usage.num_prompt_tokens = len(context.prompt)
    usage.num_cached_tokens = max(context.prompt_cache_count, 0)
    yield from reply.start()
    for event in trim(_events(request, context, responses, usage)):
        yield from reply.feed(event)


def _events(
    request: ChatRequest, context: Any, responses: Iterator[Any], usage: Usage
) -> Iterator[Event]:
    chat = request.chat
    if chat.max_tokens == 0:
        next(responses)
        return iter([End("length")])
    if chat.prefill:
        responses = with_leading_space(responses, request.tokenizer)
    parser = context.tool_parser if context.has_tool_calling else None
    splitter = Splitter(
        context.text_sm,
        context.initial_state,
        parser,
        request.tools,
        chat.stop,
        streams_calls=_is_streamed(chat),
    )
    return read_reply(
        responses,
        splitter,
        usage,
        one_call=chat.one_call,
        is_cut_by_context=request.is_cut_by_context,
    )


def _is_streamed(chat: Chat) -> bool:
    return optional(chat.body, "stream", bool, False)


def _fail(exchange: Exchange, reply: Reply, exc: Exception) -> None:
    error = explain(exchange, exc)
    if error.status >= 500:
        logging.error("%s failed", exchange.place, exc_info=exc)
    if not exchange.is_started:
        raise error from exc
    for body in reply.failure(error):
        exchange.send_event(body)


def _log_progress(num_processed: int, num_total: int) -> None:
    logging.info("Prompt processing progress: %s/%s", num_processed, num_total)
