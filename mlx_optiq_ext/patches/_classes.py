"""mlx-lm's classes of the server, with what differs in ours."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm import server

from .. import _interrupts, serving
from ._request import Request, current
from .server import end_process


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
            end_process(_interrupts.LINE, _interrupts.STATUS)


class Handler(server.APIHandler):
    """Answers every request by the table of routes."""

    timeout = serving.IDLE_TIMEOUT
    # Set while a request is being answered.
    exchange: Any = None
    requestline: str = ""

    def answer(self) -> None:
        serving.serve(self)

    do_GET = do_POST = do_OPTIONS = answer

    def __getattr__(self, name: str) -> Callable[[], None]:
        # The table knows which methods there are, and what to say of the others.
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        serving.send_malformed(self, code, message)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        if self.exchange is not None:
            self.exchange.measured.status = int(code)
        # Queries carry tokens, which nobody expects in a log.
        line, _, rest = str(self.requestline).partition("?")
        version = rest.rpartition(" ")[2]
        self.requestline = serving.printable(f"{line} {version}".strip())
        super().log_request(code, size)


class Generator(server.ResponseGenerator):
    """Generates the replies to what is put into its line, and outlives failures.

    A row of the line is an `Inbox`, a `Request` and its `Arguments`.

    Args:
        model_provider (ModelProvider): mlx-lm's.
        prompt_cache (PromptCache): What is kept of earlier prompts.
    """

    def __init__(self, model_provider: Any, prompt_cache: Any):
        self.state = serving.ServerState()
        super().__init__(model_provider, prompt_cache)

    def _next_request(self, timeout: float | None = None) -> Any:
        return serving.admit(self, super()._next_request(timeout))

    def _generate(self) -> None:
        serving.run_again(self, super()._generate)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        return serving.make_prompt(
            super()._tokenize, self.model_provider, tokenizer, request, args
        )

    def _is_batchable(self, args: Any) -> bool:
        if super()._is_batchable(args):
            return True
        if serving.speculation_of(self.model_provider.model) is None:
            return False
        # Where sequences have seeds of their own, one does not keep a request alone.
        unseeded = dataclasses.replace(args, seed=None)
        return serving.can_share(args) and super()._is_batchable(unseeded)

    def _serve_single(self, request: Any, stream: Any) -> None:
        *_, arguments = request
        arguments.is_single = True
        token = current.set(_drafting(self.model_provider.model, arguments))
        try:
            super()._serve_single(request, stream)
        finally:
            current.reset(token)


def _drafting(model: Any, arguments: Any) -> Request | None:
    """What ``stream_generate`` is asked for on behalf of a request."""
    served = serving.speculation_of(model)
    if served is None:
        return None
    options = serving.options_of(arguments, served)
    drafts = served.drafter.computes_drafts or options.prompt_lookup
    if options.num_draft_tokens == 0 or not drafts:
        return None
    return Request(
        draft=served.drafter,
        num_draft_tokens=options.num_draft_tokens,
        prompt_lookup=options.prompt_lookup,
        stats=options.stats,
        seed=options.seed,
    )


def serve(host: str, port: int, provider: Any, *, is_command: bool) -> None:
    """Serve until the process is interrupted.

    Args:
        host (str): Of the address to listen at.
        port (int): And its port.
        provider (ModelProvider): mlx-lm's.
        is_command (bool): Whether this is mlx-lm's command, not some other program.
    """
    prompt_cache = serving.PromptCache.of(
        provider.cli_args, is_distributed=provider.is_distributed
    )
    generator = Generator(provider, prompt_cache)
    if generator._rank == 0:
        server_class = CommandServer if is_command else Server
        server._run_http_server(host, port, generator, server_class, Handler)
    else:
        generator.join()
