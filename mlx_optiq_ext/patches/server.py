"""Wrappers for ``mlx_lm.server``: more routes, errors that clients know, our flags."""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import wrapt

from .._options import AutoNumber
from .command_line import SpeculationParser, add_flags

RECOMMENDED_HELP = (
    "Sample as the model's generation_config.json recommends, penalties included, "
    "where neither a request nor --temp, --top-p, --top-k or --min-p says otherwise. "
    "--mtp and --draft imply it."
)
# The fields of a request that these flags of mlx-lm are the defaults of.
SAMPLING_FLAGS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
}
UNGUARDED = "Anyone who reaches {} can use this server: it has no --api-key"


class ServerParser(SpeculationParser):
    """mlx-lm's parser with our flags at the end."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for add in FLAGS:
            add(self)
        defaults = {name: self.get_default(name) for name in SAMPLING_FLAGS}
        # None tells a default from a value that was asked for.
        self.set_defaults(**dict.fromkeys(SAMPLING_FLAGS))
        parsed = super().parse_args(args, namespace)
        _settle_sampling(parsed, defaults)
        if parsed.draft is not None:
            from ..drafters import is_draft_model

            # Requests in a batch share no draft model: mlx-lm serves them one by one.
            if is_draft_model(parsed.draft):
                if parsed.draft_vocab is not None:
                    self.error("argument --draft-vocab: needs --mtp")
                parsed.draft_model, parsed.draft = parsed.draft, None
                if parsed.num_draft_tokens == "auto":
                    parsed.num_draft_tokens = self.num_draft_tokens
        if parsed.num_draft_tokens == "auto":
            # Requests that do not say are given this, and checked by mlx-lm.
            parsed.num_draft_tokens = AutoNumber(1)
        return parsed


class _Argparse(wrapt.ObjectProxy):
    """The module ``argparse``, but with our parser."""

    ArgumentParser = ServerParser


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        type=_nonempty,
        help="Key that requests must have, as a bearer token or as x-api-key",
    )
    parser.add_argument(
        "--max-request-size",
        type=_size,
        default="32MB",
        help="Largest body of a request that is read (default: %(default)s)",
    )
    parser.add_argument(
        "--recommended-sampling",
        action="store_true",
        help=RECOMMENDED_HELP,
    )


def _settle_sampling(parsed: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Put mlx-lm's defaults back, and say which flags were given."""
    given = {flag for flag in SAMPLING_FLAGS if getattr(parsed, flag) is not None}
    for flag in SAMPLING_FLAGS.keys() - given:
        setattr(parsed, flag, defaults[flag])
    parsed.given_sampling = {SAMPLING_FLAGS[flag] for flag in given}
    if parsed.mtp or parsed.draft is not None:
        parsed.recommended_sampling = True


# Each adds the flags of one concern to the parser.
FLAGS = (add_serving_flags, add_flags)


def run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Serve with our classes in the places of mlx-lm's."""
    from ._classes import serve

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    host, port, provider = call.args[:3]
    if not is_local(host) and getattr(provider.cli_args, "api_key", None) is None:
        # Not by logging, which may be told to be silent.
        warnings.warn(UNGUARDED.format(host), stacklevel=2)
    serve(host, port, provider)


def logits_processors(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    processors = wrapped(*args, **kwargs)
    if not getattr(args[0], "is_single", False):
        return processors
    from ..serving import with_cached_tokens

    return with_cached_tokens(processors, args[0])


def scan_cache_dir(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from huggingface_hub import CacheNotFound

    # Whoever never downloaded a model has no such folder.
    try:
        return wrapped(*args, **kwargs)
    except CacheNotFound:
        return SimpleNamespace(repos=frozenset())


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # The parser is made and used within this function.
    module: Any = sys.modules[wrapped.__module__]
    module.argparse = _Argparse(argparse)
    try:
        return wrapped(*args, **kwargs)
    finally:
        module.argparse = argparse


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _size(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"K": 10, "M": 20, "G": 30}.get(number[-1:], 0)
    digits = number[:-1] if factor else number
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a size like 32MB, got {text!r}")
    return int(digits) << factor
