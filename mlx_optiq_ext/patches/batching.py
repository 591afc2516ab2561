"""Wrappers for mlx-lm's server and batch generator: speculation in what they decode."""

from __future__ import annotations

import inspect
from typing import Any

from .._record import record_of


def batch_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    if (served := record_of(instance.model).served) is None:
        return
    from ..decoding import SpeculativeBatch

    instance._generation_batch = SpeculativeBatch(
        instance.model, instance.sampler, served.drafter, served.options
    )


def insert_segments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    arguments = getattr(call.arguments["segments"][0], "arguments", None)
    if arguments is None:
        return wrapped(*args, **kwargs)
    from ..serving import guard_sequences

    guard_sequences(call.arguments, arguments)
    if (served := record_of(instance.model).served) is None:
        return wrapped(*call.args, **call.kwargs)
    caches = call.arguments.get("caches") or [None] * len(call.arguments["segments"])
    call.arguments["caches"] = [
        served.complete(cache, instance.max_kv_size) for cache in caches
    ]
    uids = wrapped(*call.args, **call.kwargs)
    alive = instance._find_uids({*served.uids, *uids})
    served.admit(uids, arguments, alive)
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
        from ..serving import serve_speculatively

        try:
            serve_speculatively(instance)
        except BaseException:
            # Otherwise the next request would find the model loaded, and be served
            # without speculation.
            instance.reset()
            raise
