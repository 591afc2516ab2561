"""Wrappers for ``mlx_lm.generate``.

The modules for speculation are imported when it is asked for, so that ``import mlx_lm``
stays as fast as it was.
"""

from __future__ import annotations

import inspect
from typing import Any

from ._request import is_free, is_plain


def generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if is_plain(args, kwargs):
        return wrapped(*args, **kwargs)
    from ._speculation import Speculation, take_request

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    options = call.arguments.setdefault("kwargs", {})
    drafting = take_request(call.arguments["model"], options)
    options["draft_model"] = drafting
    text = wrapped(*call.args, **call.kwargs)
    if call.arguments.get("verbose") and isinstance(drafting, Speculation):
        # This line stands beside those that mlx-lm prints.
        print(f"Speculation: {drafting.stats}")  # noqa: T201
    return text


def stream_generate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if not is_free(kwargs):
        from ._structure import constrain

        call = inspect.signature(wrapped).bind(*args, **kwargs)
        options = call.arguments.setdefault("kwargs", {})
        constrain(call.arguments["tokenizer"], call.arguments["prompt"], options)
        args, kwargs = call.args, call.kwargs
    if is_plain(args, kwargs):
        return wrapped(*args, **kwargs)
    from ._speculation import Speculation, take_request

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    options = call.arguments.setdefault("kwargs", {})
    options["draft_model"] = call.arguments.pop("draft_model", None)
    drafting = take_request(call.arguments["model"], options)
    del options["draft_model"]
    call.arguments["draft_model"] = drafting
    if not isinstance(drafting, Speculation):
        return wrapped(*call.args, **call.kwargs)
    drafting.carry(options)
    return drafting.responses(wrapped(*call.args, **call.kwargs))


def speculative_generate_step(
    wrapped: Any, instance: Any, args: Any, kwargs: Any
) -> Any:
    from ._speculation import Speculation, rescued

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    drafting = rescued(call.arguments["model"], call.arguments["draft_model"], kwargs)
    if not isinstance(drafting, Speculation):
        return wrapped(*args, **kwargs)
    del call.arguments["draft_model"]
    return drafting.steps(**call.arguments)


def generate_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if is_plain((), {}):
        return wrapped(*args, **kwargs)
    from ._speculation import Speculation, take_request

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    drafting = take_request(call.arguments["model"], {})
    if not isinstance(drafting, Speculation):
        return wrapped(*args, **kwargs)
    steps = drafting.steps(**call.arguments)
    return ((token, logprobs) for token, logprobs, _ in steps)
