"""Wrappers for mlx-lm's server and batch generator: speculation in what they decode."""

from __future__ import annotations

import inspect
from typing import Any

from .._record import record_of
from ._request import Request, current


def batch_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    if (served := record_of(instance.model).served) is None:
        return
    from ..decoding import SpeculativeBatch

    instance._generation_batch = SpeculativeBatch(
        instance.model, instance.sampler, served.drafter, served.options
    )


def insert_segments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    request = current.get()
    if request is None or request.arguments is None:
        return wrapped(*args, **kwargs)
    from ..serving._recovery import guard_sequences

    current.set(None)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    guard_sequences(call.arguments, request.arguments)
    if (served := record_of(instance.model).served) is None:
        return wrapped(*call.args, **call.kwargs)
    caches = call.arguments.get("caches") or [None] * len(call.arguments["segments"])
    call.arguments["caches"] = [
        served.complete(cache, instance.max_kv_size) for cache in caches
    ]
    uids = wrapped(*call.args, **call.kwargs)
    alive = instance._find_uids({*served.uids, *uids})
    served.admit(uids, request.arguments, alive)
    return uids


def load_served(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    flags = instance.cli_args
    asks = getattr(flags, "mtp", None) or getattr(flags, "draft", None)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    draft_model = call.arguments.get("draft_model_path")
    if draft_model is not None and draft_model == flags.draft_model:
        from ..drafters import check_draft_model

        check_draft_model(draft_model)
    wrapped(*args, **kwargs)
    if asks and instance.draft_model is None:
        from ..serving._speculation import serve_speculatively

        try:
            serve_speculatively(instance)
        except BaseException:
            # Otherwise the next request would find the model loaded, and be served
            # without speculation.
            instance.reset()
            raise


def serve_single(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if (served := record_of(instance.model_provider.model).served) is None:
        return wrapped(*args, **kwargs)
    from ..serving._speculation import options_of

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    *_, arguments = call.arguments["request"]
    options = options_of(arguments)
    if options.num_draft_tokens == 0:
        return wrapped(*args, **kwargs)
    request = Request(
        draft=served.drafter,
        num_draft_tokens=options.num_draft_tokens,
        stats=options.stats,
    )
    token = current.set(request)
    try:
        return wrapped(*args, **kwargs)
    finally:
        current.reset(token)
