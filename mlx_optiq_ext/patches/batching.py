"""Wrappers for mlx-lm's server and batch generator: speculation in what they decode."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any


def batch_generator(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    if (served := _served(instance.model)) is None:
        return
    from ..decoding._batch import SpeculativeBatch

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
    if (served := _served(instance.model)) is None:
        return wrapped(*call.args, **call.kwargs)
    caches = call.arguments.get("caches") or [None] * len(call.arguments["segments"])
    call.arguments["caches"] = [
        served.complete(cache, instance.max_kv_size) for cache in caches
    ]
    uids = wrapped(*call.args, **call.kwargs)
    served.admit(uids, arguments, instance._find_uids(range(uids[-1] + 1)))
    return uids


def load_served(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    flags = instance.cli_args
    asks = getattr(flags, "mtp", None) or getattr(flags, "draft", None)
    if asks and instance.draft_model is None:
        from ..serving import serve_speculatively

        serve_speculatively(instance)


def load_default(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from .._errors import SpeculationError

    try:
        return wrapped(*args, **kwargs)
    except SpeculationError as error:
        # This is the generation thread; the main one would serve without a model.
        logging.critical("%s", error)
        logging.shutdown()
        os._exit(1)


def _served(model: Any) -> Any:
    return getattr(model, "_served", None)
