"""Which request goes where: the added routes, and mlx-lm's own."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from mlx_lm import server

from . import _anthropic, _completions, _responses
from ._errors import APIError, during_generation
from ._events import Usage
from ._exchange import Exchange
from ._generation import count_tokens
from ._metrics import finish, require
from ._request import Request
from ._serve import send_reply
from ._store import Stored

Body = dict[str, Any]


class Route(NamedTuple):
    """What answers requests of one method to paths that match.

    Args:
        method: Of HTTP.
        pattern: Of the whole path, without the query.
        answer: Called with the exchange and the pattern's groups.
        is_open: Whether it needs no key.
    """

    method: str
    pattern: re.Pattern[str]
    answer: Callable[..., None]
    is_open: bool = False

    @property
    def name(self) -> str:
        """The path, with placeholders."""
        pattern = self.pattern.pattern.removesuffix("(?:/.*)?")
        return pattern.replace("(?:/v1)?", "/v1").replace("([^/]+)", "{id}")


def serve(handler: Any) -> None:
    """Answer the request whose headers a handler has read."""
    exchange = handler.exchange = Exchange(handler)
    try:
        _answer(exchange)
    except (ConnectionError, TimeoutError) as exc:
        logging.info("%s %s: %s", handler.command, exchange.path, exc)
    finally:
        exchange.close()
        handler.exchange = None
        state = exchange.generator.state
        state.exchanges.discard(exchange)
        finish(exchange, state.metrics)


def _answer(exchange: Exchange) -> None:
    try:
        route, groups = _find(exchange.handler.command, exchange.path)
        exchange.measured.route = route.name
        if not route.is_open:
            check_key(exchange)
        route.answer(exchange, *groups)
    except (ConnectionError, TimeoutError):
        raise
    except APIError as error:
        _send_error(exchange, error)
    except Exception as exc:
        logging.exception("%s %s", exchange.handler.command, exchange.path)
        _send_error(exchange, during_generation(exc))


def _send_error(exchange: Exchange, error: APIError) -> None:
    if not exchange.is_started:
        exchange.send_error(error)


def _find(method: str, path: str) -> tuple[Route, tuple[str, ...]]:
    allowed = []
    for route in ROUTES:
        if match := route.pattern.fullmatch(path):
            allowed.append(route.method)
            if route.method == method:
                return route, match.groups()
    if not set(allowed) <= {"HEAD", "OPTIONS"}:
        raise APIError(405, f"{path} takes {', '.join(allowed)}, not {method}")
    raise APIError(404, f"there is nothing at {path}", code="unknown_url")


def check_key(exchange: Exchange) -> None:
    """Refuse a request without the server's key.

    Raises:
        APIError: 401, if the server has a key and the request has not.
    """
    expected = getattr(exchange.cli_args, "api_key", None)
    if expected is None:
        return
    headers = exchange.handler.headers
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    found = [bearer.strip() if scheme.lower() == "bearer" else ""]
    found.append(headers.get("x-api-key", ""))
    # Headers are bytes, which http.server decodes as Latin-1.
    keys = [key.encode("latin-1", "replace") for key in found]
    matches = [hmac.compare_digest(key, expected.encode()) for key in keys]
    if not any(matches):
        raise APIError(401, "the API key is missing or wrong", code="invalid_api_key")


def _messages(exchange: Exchange) -> None:
    body = exchange.read_json()
    request = _anthropic.read_request(body)
    usage = Usage()
    model = _echoed(exchange, request)
    reply = _anthropic.MessageReply(model, usage, exchange.request_id)
    send_reply(exchange, request, reply, usage)


def _count_message_tokens(exchange: Exchange) -> None:
    request = _anthropic.read_request(exchange.read_json(), counts_only=True)
    _send_count(exchange, request, {})


def _responses_create(exchange: Exchange) -> None:
    store = exchange.generator.state.store
    asked = _responses.read_request(exchange.read_json(), store)
    usage = Usage()
    model = _echoed(exchange, asked.request)
    reply = _responses.ResponseReply(model, asked, usage)

    def keep(response: Body) -> None:
        if asked.is_stored:
            store.add(Stored(response, asked.items))

    send_reply(exchange, asked.request, reply, usage, keep)


def _count_response_tokens(exchange: Exchange) -> None:
    store = exchange.generator.state.store
    asked = _responses.read_request(exchange.read_json(), store)
    _send_count(exchange, asked.request, {"object": "response.input_tokens"})


def _send_count(exchange: Exchange, request: Request, body: Body) -> None:
    num_tokens = count_tokens(exchange, request)
    exchange.send_json(200, body | {"input_tokens": num_tokens})


def _chat_completions(exchange: Exchange) -> None:
    request = _completions.read_chat_request(exchange.read_json())
    usage = Usage()
    reply = _completions.ChatReply(exchange, request, usage)
    send_reply(exchange, request, reply, usage)


def _text_completions(exchange: Exchange) -> None:
    request = _completions.read_completion_request(exchange.read_json())
    usage = Usage()
    reply = _completions.TextReply(exchange, request, usage)
    send_reply(exchange, request, reply, usage)


def _responses_get(exchange: Exchange, response_id: str) -> None:
    exchange.send_json(200, _stored(exchange, response_id).response)


def _responses_delete(exchange: Exchange, response_id: str) -> None:
    _stored(exchange, response_id)
    exchange.generator.state.store.remove(response_id)
    body = {"id": response_id, "object": "response", "deleted": True}
    exchange.send_json(200, body)


def _responses_cancel(exchange: Exchange, response_id: str) -> None:
    _stored(exchange, response_id)
    raise APIError(400, "only a response in the background can be cancelled")


def _responses_items(exchange: Exchange, response_id: str) -> None:
    items = _stored(exchange, response_id).items
    exchange.send_json(200, _responses.page(items, parse_qs(exchange.query)))


def _stored(exchange: Exchange, response_id: str) -> Stored:
    stored = exchange.generator.state.store.get(response_id)
    if stored is None:
        raise APIError(404, f"Response with id '{response_id}' not found.")
    return stored


def _responses_upgrade(exchange: Exchange) -> None:
    if "Upgrade" in exchange.handler.headers:
        raise APIError(426, "responses are streamed over HTTP, not over a web socket")
    raise APIError(405, "/v1/responses takes POST, not GET")


def _echoed(exchange: Exchange, request: Request) -> str:
    return request.model or str(exchange.cli_args.model)


def _metrics(exchange: Exchange) -> None:
    state = exchange.generator.state
    metrics = require(state.metrics)
    num_waiting = exchange.generator.requests.qsize()
    text = metrics.text(num_waiting, len(state.exchanges))
    exchange.send_text(text, metrics.content_type)


def _probe(exchange: Exchange) -> None:
    exchange.send_head(200)


def _upstream_get(exchange: Exchange) -> None:
    exchange.handler.path = exchange.path
    server.APIHandler.do_GET(exchange.handler)


def _upstream_options(exchange: Exchange) -> None:
    server.APIHandler.do_OPTIONS(exchange.handler)


def _route(
    method: str, pattern: str, answer: Callable[..., None], is_open: bool = False
) -> Route:
    return Route(method, re.compile(pattern), answer, is_open)


_RESPONSES = "(?:/v1)?/responses"
_RESPONSE = f"{_RESPONSES}/([^/]+)"

ROUTES = (
    _route("POST", "/v1/messages", _messages),
    _route("POST", "/v1/messages/count_tokens", _count_message_tokens),
    _route("POST", _RESPONSES, _responses_create),
    _route("GET", _RESPONSES, _responses_upgrade),
    _route("POST", f"{_RESPONSES}/input_tokens", _count_response_tokens),
    _route("GET", _RESPONSE, _responses_get),
    _route("DELETE", _RESPONSE, _responses_delete),
    _route("GET", f"{_RESPONSE}/input_items", _responses_items),
    _route("POST", f"{_RESPONSE}/cancel", _responses_cancel),
    _route("HEAD", "/|/api/hello|/health", _probe, is_open=True),
    _route("GET", "/health", _upstream_get, is_open=True),
    _route("GET", "/metrics", _metrics),
    _route("GET", "/v1/models(?:/.*)?", _upstream_get),
    _route("OPTIONS", r"/.*|\*", _upstream_options, is_open=True),
    _route("POST", "/v1/completions", _text_completions),
    _route("POST", "(?:/v1)?/chat/completions", _chat_completions),
)
