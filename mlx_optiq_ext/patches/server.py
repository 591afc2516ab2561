"""Wrappers for ``mlx_lm.server``: more routes, errors that clients know, our flags."""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import nullcontext
from dataclasses import replace
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, NoReturn

import wrapt

from .._errors import SpeculationError
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
API_KEY = "MLX_OPTIQ_EXT_API_KEY"  # of the environment
# What a shell expects of a program that an interrupt ended.
INTERRUPTED = ("Stopped.", 128 + signal.SIGINT)
EXIT_STATUS = (
    "Exit status: 130 after Ctrl-C, 1 if the model cannot be loaded or the address "
    "cannot be listened at, 2 for wrong arguments."
)
UNGUARDED = "Anyone who reaches {} can use this server: it has no --api-key"


class Server(ThreadingHTTPServer):
    """A server to which many may connect at once, and go without a traceback."""

    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class CommandServer(Server):
    """The server of mlx-lm's command, which ends as a program does."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            super().serve_forever(poll_interval)
        except KeyboardInterrupt:
            # mlx-lm would wait for the end of a generation that nobody reads any more.
            end_process(*INTERRUPTED)


class ServerParser(SpeculationParser):
    """mlx-lm's parser with our flags at the end."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for add in FLAGS:
            add(self)
        defaults = {
            name: self.get_default(name)
            for name in (*SAMPLING_FLAGS, "prompt_cache_size")
        }
        # None tells a default from a value that was asked for.
        self.set_defaults(**dict.fromkeys(defaults))
        parsed = super().parse_args(args, namespace)
        parsed.is_prompt_cache_size_given = parsed.prompt_cache_size is not None
        if not parsed.is_prompt_cache_size_given:
            parsed.prompt_cache_size = defaults["prompt_cache_size"]
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
        parsed.is_command = True
        return parsed


class _Argparse(wrapt.ObjectProxy):
    """The module ``argparse``, but with our parser."""

    ArgumentParser = ServerParser


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        type=_nonempty,
        default=os.environ.get(API_KEY),
        help="Key that requests must have, as a bearer token or as x-api-key. Other "
        "users of this machine can read it here; the environment variable "
        f"{API_KEY}, which is the default, keeps it from them",
    )
    parser.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="Fetch images that requests name by http(s) URLs, from public addresses "
        "only. Without this flag images have to be data: URLs",
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
    parser.epilog = EXIT_STATUS


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
    from ..serving._exchange import current, printable

    if (exchange := current.get()) is not None:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        exchange.measured.status = int(call.arguments["code"])
    # Queries carry tokens, which nobody expects in a log.
    line, _, rest = instance.requestline.partition("?")
    version = rest.rpartition(" ")[2]
    instance.requestline = printable(f"{line} {version}".strip())
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
    model.model = loadable_name(model.model, instance.cli_args, model.adapter)
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
    from ..serving._images import has_images, reading_images
    from ..serving._sampling import recommend
    from ..serving._speculation import check_draft_tokens, speculation_of
    from ._request import Request, current

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    tokenizer, request, arguments = call.args
    recommend(arguments, instance.model_provider.model, len(tokenizer))
    is_ours = isinstance(request, _generation.ChatRequest)
    if is_ours:
        _generation.check_request(instance, tokenizer, request)
    images = reading_images() if has_images(request.messages) else nullcontext()
    with images:
        tokenized = wrapped(*args, **kwargs)
    if is_ours:
        tokenized = _generation.finish_prompt(
            instance, tokenizer, request, arguments, tokenized
        )
    _generation.check_generation(tokenizer, arguments, tokenized[0])
    if speculation_of(instance.model_provider.model) is not None:
        check_draft_tokens(arguments)
    current.set(replace(current.get() or Request(), arguments=arguments))
    return tokenized


def response_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._prompt_cache import PromptCache

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    provider = call.arguments["model_provider"]
    # Processes that share a model must keep the same, so theirs is left as it is.
    if is_command(provider) and not provider.is_distributed:
        # Its thread begins to use the cache at once.
        call.arguments["prompt_cache"] = PromptCache.of(provider.cli_args)
    return wrapped(*call.args, **call.kwargs)


def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._errors import LOADING

    try:
        return wrapped(*args, **kwargs)
    except Exception as exc:
        exc.add_note(LOADING)
        raise


def load_default(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving._sampling import describe_recommended

    try:
        wrapped(*args, **kwargs)
    except Exception as exc:
        # This is the generation thread: the main one would serve without a model.
        if not is_command(instance):
            raise
        logging.debug("The model could not be loaded", exc_info=exc)
        end_process(f"error: {exc}", 1)
    if is_command(instance) and (
        line := describe_recommended(instance.cli_args, instance.model)
    ):
        logging.warning(line)


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
    host = call.arguments["host"]
    generator = call.arguments["response_generator"]
    is_ours = is_command(generator.model_provider)
    call.arguments.setdefault("server_class", CommandServer if is_ours else Server)
    cli_args = generator.cli_args
    if not is_local(host) and getattr(cli_args, "api_key", None) is None:
        # Not by logging, which may be told to be silent.
        warnings.warn(UNGUARDED.format(host), stacklevel=2)
    try:
        return wrapped(*call.args, **call.kwargs)
    except (OSError, OverflowError) as exc:
        if not is_ours:
            raise
        # The generation thread would keep the process alive.
        port = call.arguments["port"]
        end_process(f"error: cannot listen at {host}, port {port}: {exc}", 1)


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # The parser is made and used within this function.
    module: Any = sys.modules[wrapped.__module__]
    module.argparse = _Argparse(argparse)
    try:
        return wrapped(*args, **kwargs)
    except KeyboardInterrupt:
        end_process(*INTERRUPTED)
    except (SpeculationError, OSError) as exc:
        end_process(f"error: {exc}", 1)
    finally:
        module.argparse = argparse


def is_command(provider: Any) -> bool:
    """Whether mlx-lm's command runs, and not its parts in some other program.

    Args:
        provider (ModelProvider): Other programs have their own, without a command line.
    """
    return getattr(getattr(provider, "cli_args", None), "is_command", False)


def end_process(line: str, status: int) -> NoReturn:
    """Say one line and end the process, whatever its threads are doing."""
    # A second Ctrl-C has nothing left to interrupt.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(f"{' '.join(line.split())}\n")
    sys.stderr.flush()
    os._exit(status)


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
