"""Wrappers that let mlx-lm's server and batch generator speculate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .._record import record_of
from ._request import Request, current, is_free, is_plain


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
    request = current.get()
    if request is not None and request.constrain is not None:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        _constrain(instance, call.arguments, request.constrain)
        args, kwargs = call.args, call.kwargs
    if request is not None and request.batch is not None:
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


def _constrain(
    generator: Any,
    options: dict[str, Any],
    constrain: Callable[[list[int]], list[Any]],
) -> None:
    """Give each sequence logits processors of its own, before those of all."""
    segments = options["segments"]
    given = options.get("logits_processors")
    others = given or [generator.logits_processors] * len(segments)
    options["logits_processors"] = [
        [*constrain([token for part in parts for token in part]), *(own or ())]
        for parts, own in zip(segments, others, strict=True)
    ]


def batch_generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if not is_free(kwargs):
        return _batch_generate_structured(wrapped, args, kwargs)
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
    constrain = getattr(current.get(), "constrain", None)
    token = current.set(Request(batch=drafting, constrain=constrain))
    try:
        response = wrapped(*call.args, **call.kwargs)
    finally:
        current.reset(token)
    response.speculation = drafting.stats
    if call.arguments.get("verbose"):
        # This line stands beside those that mlx-lm prints.
        for stats in drafting.stats:
            print(f"[batch_generate] Speculation: {stats}")  # noqa: T201
    return response


def _batch_generate_structured(wrapped: Any, args: Any, kwargs: Any) -> Any:
    """Generate texts of which each has a constraint of its own."""
    from ._structure import Structure

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    options = call.arguments.setdefault("kwargs", {})
    structure = Structure(call.arguments["tokenizer"], options)
    token = current.set(Request(constrain=structure.processors))
    try:
        return batch_generate(wrapped, None, call.args, call.kwargs)
    finally:
        current.reset(token)


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
