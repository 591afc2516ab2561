"""Wrappers for ``mlx_lm.server``: more routes, errors that clients know, our flags."""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import logging
import os
import signal
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any, NoReturn

import wrapt

from .._errors import SpeculationError
from .._options import API_KEY_VARIABLE, AUTO_AS_NUMBER
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
# What a shell expects of a program that an interrupt ended.
INTERRUPTED = ("Stopped.", 128 + signal.SIGINT)
EXIT_STATUS = (
    "Exit status: 130 after Ctrl-C, 1 if the model cannot be loaded or the address "
    "cannot be listened at, 2 for wrong arguments."
)
UNGUARDED = "Anyone who reaches {} can use this server: it has no --api-key"


class ServerParser(SpeculationParser):
    """mlx-lm's parser with our flags at the end."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for add in FLAGS:
            add(self)
        defaults = {
            name: self.get_default(name)
            for name in (*SAMPLING_FLAGS, "prompt_cache_size")
        }
        # None tells a default from a value that was asked for.
        self.set_defaults(**dict.fromkeys(defaults))
        parsed = super().parse_args(args, namespace)
        parsed.is_prompt_cache_size_given = parsed.prompt_cache_size is not None
        if not parsed.is_prompt_cache_size_given:
            parsed.prompt_cache_size = defaults["prompt_cache_size"]
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
            parsed.num_draft_tokens = AUTO_AS_NUMBER
        parsed.is_command = True
        return parsed


class _Argparse(wrapt.ObjectProxy):
    """The module ``argparse``, but with our parser."""

    ArgumentParser = ServerParser


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        type=_nonempty,
        default=os.environ.get(API_KEY_VARIABLE),
        help="Key that requests must have, as a bearer token or as x-api-key. Other "
        "users of this machine can read it here; the environment variable "
        f"{API_KEY_VARIABLE}, which is the default, keeps it from them",
    )
    parser.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="Fetch images that requests name by http(s) URLs, from public addresses "
        "only. Without this flag images have to be data: URLs",
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
    parser.epilog = EXIT_STATUS


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
    try:
        serve(host, port, provider, is_command=is_command(provider))
    except (OSError, OverflowError) as exc:
        if not is_command(provider):
            raise
        # The generation thread would keep the process alive.
        end_process(f"error: cannot listen at {host}, port {port}: {exc}", 1)


def logits_processors(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    processors = wrapped(*args, **kwargs)
    if not getattr(args[0], "is_single", False):
        return processors
    from ..serving import with_cached_tokens

    return with_cached_tokens(processors, args[0])


def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving import LOADING

    try:
        return wrapped(*args, **kwargs)
    except Exception as exc:
        exc.add_note(LOADING)
        raise


def load_default(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    from ..serving import describe_recommended

    try:
        wrapped(*args, **kwargs)
    except Exception as exc:
        # This is the generation thread: the main one would serve without a model.
        if not is_command(instance):
            raise
        logging.debug("The model could not be loaded", exc_info=exc)
        end_process(f"error: {exc}", 1)
    if is_command(instance) and (
        line := describe_recommended(instance.cli_args, instance.model)
    ):
        logging.warning(line)


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
    except KeyboardInterrupt:
        end_process(*INTERRUPTED)
    except (SpeculationError, OSError) as exc:
        end_process(f"error: {exc}", 1)
    finally:
        module.argparse = argparse


def is_command(provider: Any) -> bool:
    """Whether mlx-lm's command runs, and not its parts in some other program.

    Args:
        provider (ModelProvider): Other programs have their own, without a command line.
    """
    return getattr(getattr(provider, "cli_args", None), "is_command", False)


def end_process(line: str, status: int) -> NoReturn:
    """Say one line and end the process, whatever its threads are doing."""
    # A second Ctrl-C has nothing left to interrupt.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(f"{' '.join(line.split())}\n")
    sys.stderr.flush()
    os._exit(status)


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
