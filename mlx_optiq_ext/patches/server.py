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
from typing import Any, NoReturn

import wrapt

from .. import _interrupts
from .._errors import SpeculationError
from ._server_flags import ServerParser

UNGUARDED = "Anyone who reaches {} can use this server: it has no --api-key"


class _Argparse(wrapt.ObjectProxy):
    """The module ``argparse``, but with our parser."""

    ArgumentParser = ServerParser


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


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # The parser is made and used within this function.
    module: Any = sys.modules[wrapped.__module__]
    module.argparse = _Argparse(argparse)
    try:
        _interrupts.release()
        return wrapped(*args, **kwargs)
    except KeyboardInterrupt:
        end_process(_interrupts.LINE, _interrupts.STATUS)
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
