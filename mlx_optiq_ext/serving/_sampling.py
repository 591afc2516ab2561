"""The sampling that a served model recommends, for requests that do not say."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .._record import record_of

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
RECOMMENDED = "Requests that do not say are sampled as the model recommends: {}{}"
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def given_fields(body: dict[str, Any], cli_args: Any) -> Collection[str] | None:
    """What a request or the command line asks for, None if nothing is recommended.

    Args:
        body (dict): Of the request.
        cli_args (Namespace): With the sampling flags that were given.
    """
    if not getattr(cli_args, "recommended_sampling", False):
        return None
    names = {name for name, value in body.items() if value is not None}
    return names | cli_args.given_sampling


def recommend(arguments: Any, model: Any) -> None:
    """Fill in what a model recommends where nobody asked for anything.

    Args:
        arguments (Arguments): Of a request; changed in place.
        model (nn.Module): The model that the request is for.
    """
    source = record_of(model).source
    if arguments.given is None or source is None:
        return
    for name, value in read_recommended(source).items():
        if name not in arguments.given:
            owner = arguments.sampling if name in SAMPLING else arguments.logits
            setattr(owner, name, value)


def drop_idle_top_k(arguments: Any, body: dict[str, Any], num_tokens: int) -> None:
    """Take a default ``top_k`` of the whole vocabulary for no limit.

    mlx-lm refuses to sample with one, and a client that sent none cannot mend that.

    Args:
        arguments (Arguments): Of a request, with the defaults of the model and of the
            command line filled in; changed in place.
        body (dict): The body of the request.
        num_tokens (int): The number of tokens that there are to sample from.
    """
    is_default = body.get("top_k") is None
    if is_default and arguments.sampling.top_k >= num_tokens:
        arguments.sampling.top_k = 0


def describe_recommended(cli_args: Any, model: Any) -> str | None:
    """What a server says about requests that do not say how to sample.

    Args:
        cli_args (Namespace): Of the server.
        model (nn.Module): The served model.

    Returns:
        str: One line, None if such requests are decoded as by mlx-lm.
    """
    source = record_of(model).source
    if source is None or not getattr(cli_args, "recommended_sampling", False):
        return None
    found = read_recommended(source).items()
    values = {name: v for name, v in found if name not in cli_args.given_sampling}
    is_greedy = not values.get("temperature", cli_args.temp)
    names = [n for n in values if n in PENALTIES or not is_greedy]
    if not names:
        return None
    listed = ", ".join(f"{name} {values[name]}" for name in names)
    advice = "" if is_greedy else "; start with --temp 0 for greedy decoding"
    return RECOMMENDED.format(listed, advice)


@functools.cache
def read_recommended(folder: Path) -> dict[str, float]:
    """What a checkpoint's ``generation_config.json`` recommends, by field of a request.

    Args:
        folder (Path): Of the checkpoint.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        return recommended_by(config)
    except (ValueError, AttributeError) as exc:
        logging.warning("No recommended sampling, %s is not readable: %s", path, exc)
        return {}


def recommended_by(config: dict[str, Any]) -> dict[str, float]:
    """The fields of a request that a generation config has a usable value for."""
    samples = config.get("do_sample")
    names = PENALTIES if samples is False else SAMPLING + PENALTIES
    found = {name: config[name] for name in names if _is_usable(name, config.get(name))}
    if samples is False:
        found["temperature"] = 0.0
    elif samples:
        # Transformers' own default.
        found.setdefault("temperature", 1.0)
    return found


def _is_usable(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if name == "top_k":
        return isinstance(value, int) and value >= 0
    if name in ("top_p", "min_p"):
        return 0 <= value <= 1
    if name == "repetition_penalty":
        # One of 1 changes nothing, though it is computed.
        return value > 0 and value != 1
    return name in PENALTIES or value >= 0
