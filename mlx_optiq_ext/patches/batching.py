"""Wrappers for mlx-lm's server and batch generator: speculation in what they decode."""

from __future__ import annotations

import inspect
from typing import Any

from ._request import CommandLineRequest, admission, command_line


def batch_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    if (served := _served(instance.model)) is None:
        return
    from ..decoding._batch import SpeculativeBatch

    instance._generation_batch = SpeculativeBatch(
        instance.model, instance.sampler, served.drafter, served.options
    )


def insert_segments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (arguments := admission.get()) is None:
        return wrapped(*args, **kwargs)
    from ..serving._recovery import guard_sequences

    admission.set(None)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    guard_sequences(call.arguments, arguments)
    if (served := _served(instance.model)) is None:
        return wrapped(*call.args, **call.kwargs)
    caches = call.arguments.get("caches") or [None] * len(call.arguments["segments"])
    call.arguments["caches"] = [
        served.complete(cache, instance.max_kv_size) for cache in caches
    ]
    uids = wrapped(*call.args, **call.kwargs)
    served.admit(uids, arguments, instance._find_uids({*served.uids, *uids}))
    return uids


def load_served(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    flags = instance.cli_args
    asks = getattr(flags, "mtp", None) or getattr(flags, "draft", None)
    if asks and instance.draft_model is None:
        from ..serving._speculation import serve_speculatively

        serve_speculatively(instance)


def serve_single(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (served := _served(instance.model_provider.model)) is None:
        return wrapped(*args, **kwargs)
    from ..serving._speculation import options_of

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    *_, arguments = call.arguments["request"]
    options = options_of(arguments)
    if options.num_draft_tokens == 0:
        return wrapped(*args, **kwargs)
    request = CommandLineRequest(
        draft=served.drafter,
        num_draft_tokens=options.num_draft_tokens,
        stats=options.stats,
    )
    token = command_line.set(request)
    try:
        return wrapped(*args, **kwargs)
    finally:
        command_line.reset(token)


def _served(model: Any) -> Any:
    return getattr(model, "_served", None)
