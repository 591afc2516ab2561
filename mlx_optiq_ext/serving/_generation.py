"""A request on its way through mlx-lm's generation thread.

The life of a request, from the socket to a token of its reply:

1. The HTTP server gives the connection a thread, in which mlx-lm's handler, ours by
   its class, reads the headers and calls
2. `serve` of `_routes`, which finds the route of the path. The route has
3. the ``read_request`` of its API turn the body into a `Request`, and
4. `send_reply` of `_serve` start
5. a `Generation`, which puts the request into the line of the generation thread.
6. mlx-lm's loop in that thread takes it out again (`admit` of `_recovery`),
7. has its prompt made (`make_prompt` of `_prompt`) and looked up in the prompt cache,
8. gives it to the batch (``insert_segments``), and then asks the batch for tokens
9. (``next``), speculatively or not. It puts each into
10. the request's `Inbox`, from which a `Sequence` takes it for
11. `read_reply` of `_reading`, which turns its text into events; of these
12. the API's reply makes what is sent.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

from mlx_lm import server

from ._arguments import Arguments, generation_arguments
from ._constraints import compile_rules
from ._errors import APIError
from ._events import Choice, End, Event, Token, Usage
from ._exchange import WAIT_INTERVAL, Exchange
from ._explain import explain
from ._images import has_remote_images, inline_images
from ._logprobs import spelled
from ._models import DEFAULT_MODEL
from ._reading import Reading, read_reply
from ._request import Request

NO_MODEL = "there is no default model: start the server with --model, or name one"

# A space at the start of a token, in byte-level vocabularies and in SentencePiece's.
SPACES = ("\u0120", "\u2581")


class Inbox(Queue[Any]):
    """Takes what the generation thread has for a request.

    Invariant: what nobody waits for any more is stopped, whether that was known before
    it began or after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context: server.GenerationContext | None = None
        self.is_closed = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, server.GenerationContext):
            self.context = item
            if self.is_closed:
                item.stop()
        super().put(item, block, timeout)

    def close(self) -> None:
        self.is_closed = True
        if self.context is not None:
            self.context.stop()


class Sequence:
    """A sequence that is generated for a request.

    Args:
        exchange (Exchange): Whose client waits for it.
        request (Request): What is asked for.
        arguments (Arguments): How it is sampled.
    """

    def __init__(self, exchange: Exchange, request: Request, arguments: Arguments):
        self.request = request
        self.arguments = arguments
        self.inbox = Inbox()
        self._exchange = exchange
        self._check_thread()
        exchange.sequences.append(self)
        exchange.generator.state.exchanges.add(exchange)
        exchange.generator.requests.put((self.inbox, request, arguments))

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens of the prompt, 0 while it is not known."""
        context = self.inbox.context
        return 0 if context is None else len(context.prompt)

    @property
    def num_cached_tokens(self) -> int:
        """How many of them were cached, known once there is a token of the reply."""
        context = self.inbox.context
        return 0 if context is None else max(context.prompt_cache_count, 0)

    def start(self) -> None:
        """Wait until the prompt is made.

        Raises:
            Exception: Whatever the generation thread says is wrong.
        """
        self._take()

    def responses(self) -> Iterator[server.Response]:
        """Wait for one token after the other."""
        while (item := self._take()) is not None:
            if isinstance(item, tuple):
                logging.info("Prompt processing progress: %s/%s", *item)
            else:
                self._exchange.measured.count()
                yield item

    def _take(self) -> Any:
        item = self._wait()
        if isinstance(item, Exception):
            raise item
        return item

    def _wait(self) -> Any:
        while True:
            try:
                item = self.inbox.get(timeout=WAIT_INTERVAL)
            except Empty:
                self._exchange.check()
            else:
                self._exchange.check()
                return item
            self._check_thread()

    def _check_thread(self) -> None:
        if not self._exchange.generator.generation_available():
            raise RuntimeError("the generation thread died")


class Generation:
    """The replies to a request while they are generated.

    Args:
        exchange (Exchange): Whose client waits for them.
        request (Request): What is asked for.
        usage (Usage): Counts the tokens.

    Raises:
        APIError: If the request is not what it has to be.
    """

    def __init__(self, exchange: Exchange, request: Request, usage: Usage):
        self._exchange = exchange
        self._request = request
        self._usage = usage
        self._arguments = generation_arguments(request, exchange.cli_args)
        _check_model(self._arguments, exchange.cli_args)
        load_images(exchange, request, self._arguments)
        compile_rules(exchange, request, self._arguments)

    def events(self) -> Iterator[Event]:
        """What the replies consist of, the prompt being counted before the first."""
        first = self._sequence(0)
        first.start()
        responses = first.responses()
        # The length of the cached prefix is known as soon as there is a token.
        head = list(itertools.islice(responses, 1))
        self._usage.num_prompt_tokens = first.num_prompt_tokens
        self._usage.num_cached_tokens = first.num_cached_tokens
        # The prompt is in the cache by now, so that the others are spared it.
        others = [self._sequence(i) for i in range(1, self._request.num_choices)]
        yield Choice(0)
        yield from self._read(first, itertools.chain(head, responses))
        for index, sequence in enumerate(others, 1):
            sequence.start()
            yield Choice(index)
            yield from self._read(sequence, sequence.responses())

    def _sequence(self, index: int) -> Sequence:
        arguments = copy.copy(self._arguments)
        if index and arguments.seed is not None:
            arguments.seed = (arguments.seed + index) % (1 << 64)
        return Sequence(self._exchange, dataclasses.replace(self._request), arguments)

    def _read(
        self, sequence: Sequence, responses: Iterator[server.Response]
    ) -> Iterator[Event]:
        request = sequence.request
        if request.fills_cache_only:
            yield End("length")
            return
        if request.prefill:
            responses = with_leading_space(responses, request.tokenizer)
        reading = Reading(
            request.format,
            request.initial_state,
            tools=request.tools,
            stop=request.stop,
            one_call=request.one_call,
            is_cut_by_context=request.is_cut_by_context,
            keeps_space=request.keeps_space,
            gives_tokens=request.gives_logprobs or request.gives_sources,
        )
        for event in _spelled(read_reply(responses, reading, self._usage), sequence):
            if isinstance(event, End):
                sequence.inbox.close()
                if sequence.arguments.stats is not None:
                    self._usage.stats.append(sequence.arguments.stats)
            yield event


def count_tokens(exchange: Exchange, request: Request) -> int:
    """The length of a request's prompt, by the way that generation goes as well."""
    request = dataclasses.replace(request, counts_only=True)
    arguments = generation_arguments(request, exchange.cli_args)
    _check_model(arguments, exchange.cli_args)
    load_images(exchange, request, arguments)
    generator = exchange.generator
    try:
        tokenizer = loaded_tokenizer(generator.model_provider, arguments)
        if tokenizer is not None and not request.has_images:
            # No need to wait for the requests that are being served.
            return len(generator._tokenize(tokenizer, request, arguments)[0])
        sequence = Sequence(exchange, request, arguments)
        sequence.start()
    except Exception as exc:
        raise explain(exchange, exc) from exc
    return sequence.num_prompt_tokens


def load_images(exchange: Exchange, request: Request, arguments: Arguments) -> None:
    """Put the bytes of remote images into a request, if its model takes images.

    Raises:
        APIError: 400, if it takes none, or if an image cannot be had.
    """
    if not has_remote_images(request.messages):
        return
    # Only the generation thread knows the model: it may have to load it first.
    probe = Request(
        messages=[{"role": "user", "content": "image"}],
        counts_only=True,
        takes_images=True,
    )
    read_prompt(exchange, probe, arguments)
    allow_remote = getattr(exchange.cli_args, "allow_remote_images", False)
    inline_images(request.messages, allow_remote)


def read_prompt(exchange: Exchange, probe: Request, arguments: Arguments) -> None:
    """Have the generation thread load a model and read a prompt, and no more.

    Args:
        exchange (Exchange): Whose request needs to know what comes of it.
        probe (Request): One that ``counts_only``.
        arguments (Arguments): Of the exchange's own request, which name the model.

    Raises:
        APIError: If the model cannot be loaded, or does not take the prompt.
    """
    sequence = Sequence(exchange, probe, copy.copy(arguments))
    try:
        sequence.start()
    except Exception as exc:
        raise explain(exchange, exc) from exc
    sequence.inbox.close()
    exchange.sequences.remove(sequence)


def with_leading_space(responses: Iterator[Any], tokenizer: Any) -> Iterator[Any]:
    """Give a reply that continues a text the space that mlx-lm takes from it.

    Args:
        responses (Iterator[Response]): Responses of mlx-lm's server, one a token.
        tokenizer: Knows how the first of them is spelled.
    """
    for response in itertools.islice(responses, 1):
        token = tokenizer.convert_ids_to_tokens(response.token)
        if token.startswith(SPACES) and not response.text.startswith(" "):
            response = dataclasses.replace(response, text=f" {response.text}")
        yield response
    yield from responses


def _spelled(events: Iterator[Event], sequence: Sequence) -> Iterator[Event]:
    """Say of each token how it is spelled, and what drafted it if that is known."""
    number = itertools.count()
    for event in events:
        if isinstance(event, Token):
            sources = getattr(sequence.arguments.stats, "token_sources", None) or []
            index = next(number)
            source = sources[index] if index < len(sources) else None
            event = spelled(event, sequence.request.tokenizer, source)
        yield event


def _check_model(arguments: Arguments, cli_args: Any) -> None:
    if arguments.model.model == DEFAULT_MODEL and cli_args.model is None:
        raise APIError(404, NO_MODEL, param="model", code="model_not_found")


def loaded_tokenizer(provider: Any, arguments: Arguments) -> Any:
    """The tokenizer for a request, None if its model is not the one that is loaded.

    The generation thread may be loading another model at the same time. It forgets the
    key first and sets it again before the tokenizer, so a tokenizer that was read
    between two looks at the same key belongs to it.
    """
    key = provider.model_key
    tokenizer = provider.tokenizer
    is_default = arguments.model.model == DEFAULT_MODEL
    if not is_default or key is None or key[0] != provider.cli_args.model:
        return None
    return tokenizer if provider.model_key is key else None
