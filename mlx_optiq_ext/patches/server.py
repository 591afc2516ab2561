"""Wrappers for ``mlx_lm.server``: more routes, errors that clients know, our flags."""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import sys
import warnings
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import wrapt

from .._options import AUTO_AS_NUMBER
from .command_line import SpeculationParser, add_flags

NO_MODEL = "there is no default model: start the server with --model, or name one"
RECOMMENDED_HELP = (
    "Sample as the model's generation_config.json recommends, penalties included, "
    "where neither a request nor --temp, --top-p, --top-k or --min-p says otherwise. "
    "--mtp and --draft imply it."
)
# The fields of a request that these flags of mlx-lm are the defaults of.
SAMPLING_FLAGS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
}
UNGUARDED = "Anyone who reaches {} can use this server: it has no --api-key"


class Server(ThreadingHTTPServer):
    """A server to which many may connect at once, and go without a traceback."""

    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class ServerParser(SpeculationParser):
    """mlx-lm's parser with our flags at the end."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for add in FLAGS:
            add(self)
        defaults = {name: self.get_default(name) for name in SAMPLING_FLAGS}
        # None tells a default from a value that was asked for.
        self.set_defaults(**dict.fromkeys(SAMPLING_FLAGS))
        parsed = super().parse_args(args, namespace)
        _settle_sampling(parsed, defaults)
        if parsed.draft is not None:
            from ..drafters import is_draft_model

            # Requests in a batch share no draft model: mlx-lm serves them one by one.
            if is_draft_model(parsed.draft):
                if parsed.draft_vocab is not None:
                    self.error("argument --draft-vocab: needs --mtp")
                parsed.draft_model, parsed.draft = parsed.draft, None
                if parsed.num_draft_tokens == "auto":
                    parsed.num_draft_tokens = self.num_draft_tokens
        if parsed.num_draft_tokens == "auto":
            # Requests that do not say are given this, and checked by mlx-lm.
            parsed.num_draft_tokens = AUTO_AS_NUMBER
        return parsed


class _Argparse(wrapt.ObjectProxy):
    """The module ``argparse``, but with our parser."""

    ArgumentParser = ServerParser


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        type=_nonempty,
        help="Key that requests must have, as a bearer token or as x-api-key",
    )
    parser.add_argument(
        "--max-request-size",
        type=_size,
        default="32MB",
        help="Largest body of a request that is read (default: %(default)s)",
    )
    parser.add_argument(
        "--recommended-sampling",
        action="store_true",
        help=RECOMMENDED_HELP,
    )


def _settle_sampling(parsed: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Put mlx-lm's defaults back, and say which flags were given."""
    given = {flag for flag in SAMPLING_FLAGS if getattr(parsed, flag) is not None}
    for flag in SAMPLING_FLAGS.keys() - given:
        setattr(parsed, flag, defaults[flag])
    parsed.given_sampling = {SAMPLING_FLAGS[flag] for flag in given}
    if parsed.mtp or parsed.draft is not None:
        parsed.recommended_sampling = True


# Each adds the flags of one concern to the parser.
FLAGS = (add_serving_flags, add_flags)


def parse_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._routes import serve

    if wrapped(*args, **kwargs):
        serve(instance)
    # The request is answered, with an error or without: there is nothing left to do.
    return False


def handle(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._exchange import IDLE_TIMEOUT

    instance.connection.settimeout(IDLE_TIMEOUT)
    return wrapped(*args, **kwargs)


def send_error(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._malformed import send_malformed

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    send_malformed(instance, call.arguments["code"], call.arguments.get("message"))


def log_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._exchange import current

    if (exchange := current.get()) is not None:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        exchange.measured.status = int(call.arguments["code"])
    return wrapped(*args, **kwargs)


def set_completion_headers(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._exchange import current
    from ..serving._routes import UpstreamError

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    exchange = current.get()
    is_error = call.arguments.get("status_code", 200) >= 400
    if not is_error or exchange is None or not exchange.translates_errors:
        return wrapped(*args, **kwargs)
    raise UpstreamError from sys.exception()


def generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._errors import APIError
    from ..serving._exchange import current
    from ..serving._models import DEFAULT_MODEL, loadable_name
    from ..serving._sampling import note_given
    from ..serving._state import state_of

    exchange = current.get()
    if exchange is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    model = call.arguments["generation_args"].model
    model.model = loadable_name(model.model, instance.cli_args)
    defaults = getattr(instance.model_provider, "_model_map", {})
    if model.model == DEFAULT_MODEL and defaults.get(DEFAULT_MODEL, "") is None:
        raise APIError(404, NO_MODEL, param="model", code="model_not_found")
    exchange.arguments = call.arguments["generation_args"]
    chat = getattr(call.arguments["request"], "chat", None)
    body = exchange.handler.body if chat is None else chat.body
    note_given(exchange.arguments, body, instance.cli_args)
    exchange.context, responses = wrapped(*args, **kwargs)
    state_of(instance).exchanges.add(exchange)
    return exchange.context, exchange.measured.count(responses)


def await_response(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._exchange import WatchedQueue, current

    exchange = current.get()
    if exchange is None:
        return wrapped(*args, **kwargs)
    queue = args[0] if args else kwargs["response_queue"]
    return wrapped(WatchedQueue(queue, exchange))


def next_request(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._recovery import admit

    return admit(instance, wrapped(*args, **kwargs))


def generation_loop(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._recovery import run_again

    return run_again(instance, wrapped)


def tokenize(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving import _generation
    from ..serving._sampling import recommend
    from ..serving._speculation import check_draft_tokens, speculation_of
    from ._request import Request, current

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    tokenizer, request, arguments = call.args
    recommend(arguments, instance.model_provider.model)
    is_ours = isinstance(request, _generation.ChatRequest)
    if is_ours:
        _generation.check_request(instance, tokenizer, request)
    tokenized = wrapped(*args, **kwargs)
    if is_ours:
        tokenized = _generation.finish_prompt(
            instance, tokenizer, request, arguments, tokenized
        )
    _generation.check_generation(tokenizer, arguments, tokenized[0])
    if speculation_of(instance.model_provider.model) is not None:
        check_draft_tokens(arguments)
    current.set(Request(arguments=arguments))
    return tokenized


def fetch_nearest_cache(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    tokens = call.arguments["tokens"]
    cache, rest = wrapped(*args, **kwargs)
    if rest or not tokens:
        return cache, rest
    # A prompt that is all in the cache leaves no token to go on from: mlx-lm's thread
    # would die of it.
    call.arguments["tokens"] = tokens[:-1]
    cache, rest = wrapped(*call.args, **call.kwargs)
    return cache, [*rest, tokens[-1]]


def with_counts(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._exchange import current

    response = wrapped(*args, **kwargs)
    exchange = current.get()
    if exchange is not None and exchange.arguments is not None:
        from ..serving._carried import carried_by
        from ..serving._speculation import add_counts

        if (stats := carried_by(exchange.arguments).stats) is not None:
            add_counts(response, stats)
    return response


def scan_cache_dir(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from huggingface_hub import CacheNotFound

    # Whoever never downloaded a model has no such folder.
    try:
        return wrapped(*args, **kwargs)
    except CacheNotFound:
        return SimpleNamespace(repos=frozenset())


def run_http_server(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    call.arguments.setdefault("server_class", Server)
    host = call.arguments["host"]
    cli_args = call.arguments["response_generator"].cli_args
    if not is_local(host) and getattr(cli_args, "api_key", None) is None:
        # Not by logging, which may be told to be silent.
        warnings.warn(UNGUARDED.format(host), stacklevel=2)
    return wrapped(*call.args, **call.kwargs)


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # The parser is made and used within this function.
    module: Any = sys.modules[wrapped.__module__]
    module.argparse = _Argparse(argparse)
    try:
        return wrapped(*args, **kwargs)
    finally:
        module.argparse = argparse


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _size(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"K": 10, "M": 20, "G": 30}.get(number[-1:], 0)
    digits = number[:-1] if factor else number
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a size like 32MB, got {text!r}")
    return int(digits) << factor
