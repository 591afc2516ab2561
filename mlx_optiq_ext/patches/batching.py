"""Wrappers for mlx-lm's server and batch generator: speculation in what they decode."""

from __future__ import annotations

import inspect
from typing import Any

from .._record import record_of
from ._request import Request, current, is_plain


def batch_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    request, served = current.get(), record_of(instance.model).served
    drafting = None if request is None else request.batch
    if served is None and drafting is None:
        return
    from ..decoding import SpeculativeBatchGenerator

    if isinstance(instance, SpeculativeBatchGenerator):
        return
    instance.__class__ = SpeculativeBatchGenerator
    if drafting is not None:
        instance.speculate_with(drafting.drafter)
    else:
        instance.speculate_with(served.drafter, prompt_lookup=served.prompt_lookup)


def insert_segments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (request := current.get()) is not None and request.batch is not None:
        uids = wrapped(*args, **kwargs)
        for uid in uids:
            instance.set_options(uid, request.batch.sequence_options())
        return uids
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    arguments = getattr(call.arguments["segments"][0], "arguments", None)
    if arguments is None:
        return wrapped(*args, **kwargs)
    from ..serving import guard_sequences, options_of

    guard_sequences(call.arguments, arguments)
    uids = wrapped(*call.args, **call.kwargs)
    if (served := record_of(instance.model).served) is not None:
        options = options_of(arguments, served)
        for uid in uids:
            instance.set_options(uid, options)
    return uids


def batch_generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if is_plain((), kwargs) or kwargs.get("draft_model") is not None:
        return wrapped(*args, **kwargs)
    from ._speculation import BatchSpeculation, take_request

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    options = call.arguments.setdefault("kwargs", {})
    found = take_request(call.arguments["model"], options)
    if found is None:
        return wrapped(*call.args, **call.kwargs)
    drafting = BatchSpeculation(found)
    # The batch generator is made within, where no argument could say so.
    token = current.set(Request(batch=drafting))
    try:
        response = wrapped(*call.args, **call.kwargs)
    finally:
        current.reset(token)
    response.speculation = drafting.stats
    if call.arguments.get("verbose"):
        # Beside the lines that mlx-lm prints.
        for stats in drafting.stats:
            print(f"[batch_generate] Speculation: {stats}")  # noqa: T201
    return response


def load_served(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    flags = instance.cli_args
    names = ("mtp", "draft", "prompt_lookup")
    asks = any(getattr(flags, name, None) for name in names)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    draft_model = call.arguments.get("draft_model_path")
    if draft_model is not None and draft_model == flags.draft_model:
        from ..drafters import check_draft_model

        check_draft_model(draft_model)
    wrapped(*args, **kwargs)
    if asks and instance.draft_model is None:
        from ..serving import serve_speculatively

        try:
            serve_speculatively(instance)
        except BaseException:
            # Otherwise the next request would find the model loaded, and be served
            # without speculation.
            instance.reset()
            raise
