"""The table of routes: which function answers which request."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from mlx_lm import server

from . import _anthropic, _completions, _responses
from ._access import PREFLIGHT, check_key, check_origin
from ._errors import APIError, ClientGone, during_generation
from ._events import Usage
from ._exchange import Exchange
from ._generation import count_tokens
from ._metrics import finish, require
from ._models import find_model, model_list
from ._request import Request
from ._serve import send_reply
from ._store import Stored

Body = dict[str, Any]


class Route(NamedTuple):
    """One path of the server and what answers requests for it.

    Args:
        method: The HTTP method.
        template: The path, without a query. ``[/v1]`` may be left out by clients,
          ``{id}`` stands for one segment and ``{path}`` for all that follows.
        answer: Called with the exchange and the values of the placeholders.
        is_open: Whether it needs no key.
    """

    method: str
    template: str
    answer: Callable[..., None]
    is_open: bool = False

    @property
    def name(self) -> str:
        """The path, with placeholders."""
        return self.template.replace("[/v1]", "/v1")

    def match(self, path: str) -> re.Match[str] | None:
        return _pattern(self.template).fullmatch(path)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, value in (
        ("[/v1]", "(?:/v1)?"),
        ("{id}", "([^/]+)"),
        ("{path}", "(.*)"),
    ):
        pattern = pattern.replace(re.escape(name), value)
    return re.compile(pattern)


def serve(handler: Any) -> None:
    """Answer the request whose headers a handler has read."""
    exchange = handler.exchange = Exchange(handler)
    try:
        _answer(exchange)
    except ClientGone as exc:
        logging.info("%s: %s", exchange.place, exc)
    finally:
        handler.exchange = None
        exchange.close()
        state = exchange.generator.state
        state.exchanges.discard(exchange)
        finish(exchange, state.metrics)


def _answer(exchange: Exchange) -> None:
    try:
        route, groups = _find(exchange.handler.command, exchange.path)
        exchange.measured.route = route.name
        _check_access(exchange, route)
        route.answer(exchange, *groups)
    except ClientGone:
        raise
    except APIError as error:
        _send_error(exchange, error)
    except Exception as exc:
        logging.exception("%s", exchange.place)
        _send_error(exchange, during_generation(exc))


def _send_error(exchange: Exchange, error: APIError) -> None:
    if not exchange.is_started:
        exchange.send_error(error)


def _check_access(exchange: Exchange, route: Route) -> None:
    """Refuse a request before anything is done for it.

    Raises:
        APIError: 401 or 403.
    """
    headers = exchange.handler.headers
    check_origin(headers, exchange.cli_args.allowed_origins)
    if not route.is_open:
        check_key(headers, getattr(exchange.cli_args, "api_key", None))


def _find(method: str, path: str) -> tuple[Route, tuple[str, ...]]:
    """The route for a request; one for GET answers HEAD too.

    Raises:
        APIError: 404 or 405.
    """
    found = {
        route.method: (route, match.groups())
        for route in ROUTES
        if (match := route.match(path))
    }
    if "GET" in found:
        found.setdefault("HEAD", found["GET"])
    if method in found:
        return found[method]
    if found.keys() <= {"HEAD", "OPTIONS"}:
        raise APIError(404, f"there is nothing at {path}", code="unknown_url")
    raise _not_allowed(method, path, found)


def _not_allowed(method: str, path: str, allowed: Iterable[str]) -> APIError:
    names = ", ".join(allowed)
    message = f"{path} takes {names}, not {method}"
    return APIError(405, message, headers={"Allow": names})


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
        raise APIError(
            426,
            "responses are streamed over HTTP, not over a web socket",
            headers={"Upgrade": "HTTP/1.1"},
        )
    method = exchange.handler.command
    raise _not_allowed(method, exchange.path, ("POST", "OPTIONS"))


def _echoed(exchange: Exchange, request: Request) -> str:
    return request.model or str(exchange.cli_args.model)


def _models(exchange: Exchange) -> None:
    body = model_list(exchange.cli_args, exchange.handler.created)
    exchange.send_json(200, body)


def _models_get(exchange: Exchange, model: str) -> None:
    created = exchange.handler.created
    exchange.send_json(200, find_model(unquote(model), exchange.cli_args, created))


def _metrics(exchange: Exchange) -> None:
    state = exchange.generator.state
    metrics = require(state.metrics)
    num_waiting = exchange.generator.requests.qsize()
    text = metrics.text(num_waiting, state.exchanges)
    exchange.send_text(text, metrics.content_type)


def _probe(exchange: Exchange) -> None:
    exchange.send_head(200)


def _preflight(exchange: Exchange, *_: str) -> None:
    exchange.send_head(204, PREFLIGHT)


def _health(exchange: Exchange) -> None:
    exchange.handler.path = exchange.path
    server.APIHandler.do_GET(exchange.handler)


_RESPONSES = "[/v1]/responses"

ROUTES = (
    Route("POST", "/v1/messages", _messages),
    Route("POST", "/v1/messages/count_tokens", _count_message_tokens),
    Route("POST", _RESPONSES, _responses_create),
    Route("GET", _RESPONSES, _responses_upgrade),
    Route("POST", f"{_RESPONSES}/input_tokens", _count_response_tokens),
    Route("GET", f"{_RESPONSES}/{{id}}", _responses_get),
    Route("DELETE", f"{_RESPONSES}/{{id}}", _responses_delete),
    Route("GET", f"{_RESPONSES}/{{id}}/input_items", _responses_items),
    Route("POST", f"{_RESPONSES}/{{id}}/cancel", _responses_cancel),
    Route("HEAD", "/", _probe, is_open=True),
    Route("HEAD", "/api/hello", _probe, is_open=True),
    Route("GET", "/health", _health, is_open=True),
    Route("GET", "/metrics", _metrics),
    Route("GET", "/v1/models", _models),
    Route("GET", "/v1/models/{path}", _models_get),
    Route("OPTIONS", "/{path}", _preflight, is_open=True),
    Route("OPTIONS", "*", _preflight, is_open=True),
    Route("POST", "/v1/completions", _text_completions),
    Route("POST", "[/v1]/chat/completions", _chat_completions),
)
