"""Wrappers that keep the MTP head of a model where mlx-lm writes models.

``mlx_lm.utils.save`` is called by ``convert``, ``fuse`` and the commands that learn a
quantisation.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .._errors import SpeculationError
from .._record import record_of

NO_MTP_HELP = (
    "Drop the multi-token-prediction head. By default that of Qwen3.5, Qwen3.6 and "
    "Qwen3.8 models is kept, quantised as the model is."
)
NOT_KEPT = (
    "The model is written without its MTP head: {} Pass --no-mtp (from Python "
    "mtp=False) if that is meant; mlx-optiq-ext extract-mtp ORIGINAL --into {} adds "
    "a head later."
)
DECLARED = "its config.json says that there is one, and none was found in {}."

keeps_head: ContextVar[bool] = ContextVar("keeps_head", default=True)


def configure_parser(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    parser = wrapped(*args, **kwargs)
    # SUPPRESS makes convert get no new argument unless the flag is given.
    parser.add_argument(
        "--no-mtp",
        dest="mtp",
        action="store_false",
        default=argparse.SUPPRESS,
        help=NO_MTP_HELP,
    )
    return parser


def convert(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if "mtp" not in kwargs:
        return wrapped(*args, **kwargs)
    keeps = kwargs.pop("mtp")
    if not isinstance(keeps, bool):
        raise ValueError(f"mtp must be True or False, got {keeps!r}.")
    token = keeps_head.set(keeps)
    try:
        return wrapped(*args, **kwargs)
    finally:
        keeps_head.reset(token)


def save(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    model = call.arguments["model"]
    if not keeps_head.get() or not _may_have_head(model):
        return wrapped(*args, **kwargs)
    # The head is loaded before the model is written, because a donated model has lost
    # its weights by then.
    head = _head_to_keep(model, call.arguments)
    saved = wrapped(*args, **kwargs)
    if head is not None:
        _keep(head, Path(call.arguments["dst_path"]))
    return saved


def _may_have_head(model: Any) -> bool:
    from ..heads import may_have_head

    return may_have_head(model)


def _head_to_keep(model: Any, arguments: dict[str, Any]) -> Any:
    """Load the head to write with a model, and warn if a declared one is not found."""
    from ..heads import Host, carry_head

    config = arguments["config"]
    places = [record_of(model).source, arguments["src_path_or_repo"]]
    sources = list(dict.fromkeys(_full(place) for place in places if place is not None))
    try:
        head = carry_head(sources, Host.of(model), config)
        reason = DECLARED.format(" or ".join(sources))
    # The model is written whatever is wrong with its head.
    except Exception as error:
        head, reason = None, _reason(error)
    text_config = config.get("text_config") or config
    if head is None and text_config.get("mtp_num_hidden_layers"):
        _warn_not_kept(reason, Path(arguments["dst_path"]))
    return head


def _full(place: str | Path) -> str:
    """Make the path of a place on this machine absolute; a Hub id stays as it is."""
    return str(Path(place).absolute() if Path(place).exists() else place)


def _keep(head: Any, folder: Path) -> None:
    """Write a head beside the model just written, and say whether that worked."""
    from ..heads import add_sidecar

    try:
        file = add_sidecar(folder, head)
    # An error would suggest that the model is not written, but it is.
    except Exception as error:
        _warn_not_kept(_reason(error), folder)
        return
    # This line stands beside those that mlx-lm prints.
    print(f"[INFO] Kept the MTP head in {file}")  # noqa: T201


def _reason(error: Exception) -> str:
    is_said = isinstance(error, (SpeculationError, OSError))
    text = str(error) if is_said else f"{type(error).__name__}: {error}"
    return text if text.endswith(".") else f"{text}."


def _warn_not_kept(reason: str, folder: Path) -> None:
    message = NOT_KEPT.format(reason, shlex.quote(str(folder)))
    warnings.warn(message, stacklevel=3)
