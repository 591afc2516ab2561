"""Makes a module that is ready to run from stored tensors."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5 import TextModelArgs

from .._random_state import random_state_kept
from ._config import text_config
from ._head import MTPHead, head_args
from ._layouts import rename
from ._locate import StoredHead, Tensors, find_head
from ._norms import restore_norms
from ._quantization import match_quantization, quantize_as_declared


def load_head(source: str | Path, args: TextModelArgs, dtype: mx.Dtype) -> MTPHead:
    """Load the MTP head of a Qwen3.5, Qwen3.6 or Qwen3.8 model.

    Args:
        source (str or Path): The model's folder, or another folder, ``.safetensors``
          file or Hub id with its head.
        args (TextModelArgs): The arguments of the model that reads text.
        dtype (mx.Dtype): The type of the model's states. The head is cast to it: wider
          weights would have everything after them computed in their type.

    Raises:
        SpeculationError: If there is no head, or not one for this model.
    """
    return build_head(find_head(source), args, dtype)


def build_head(stored: StoredHead, args: TextModelArgs, dtype: mx.Dtype) -> MTPHead:
    """Make a head of the tensors that were found.

    Args:
        stored (StoredHead): The tensors.
        args (TextModelArgs): The arguments of the model that reads text.
        dtype (mx.Dtype): The type of the model's states.

    Raises:
        SpeculationError: If it is not a head for this model.
    """
    weights = rename(stored)
    _check_kind(stored, weights)
    with random_state_kept():
        head = MTPHead(head_args(stored, weights, args))
        _check_tensors(stored, head, weights)
        _check_vocabulary(stored, args)
        match_quantization(stored, head, weights)
    _check_numbers(stored, weights)
    weights = {
        name: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x
        for name, x in restore_norms(stored, weights).items()
    }
    _fill(stored, head, weights)
    quantize_as_declared(stored, head)
    return head.eval()


def _fill(stored: StoredHead, head: MTPHead, weights: Tensors) -> None:
    try:
        head.load_weights(list(weights.items()))
        mx.eval(head.parameters())
    except (ValueError, RuntimeError) as exc:
        raise stored.error(f"its tensors cannot be read: {exc}") from exc


def _check_kind(stored: StoredHead, weights: Tensors) -> None:
    config = text_config(stored.config)
    num_layers = config.get("mtp_num_hidden_layers") or 1
    if num_layers > 1 or any(re.match(r"layers\.[1-9]", name) for name in weights):
        raise stored.error("it has more than one layer, and only one is supported.")
    if config.get("mtp_use_dedicated_embeddings") or "embed_tokens.weight" in weights:
        raise stored.error("it has embeddings of its own, and that is not supported.")
    if "fc_embedding.weight" in weights or "fc_hidden.weight" in weights:
        raise stored.error(
            "it has fc_embedding and fc_hidden in place of fc, so it is of a kind "
            "newer than that of Qwen3.5, Qwen3.6 and Qwen3.8, which is not supported."
        )


def _check_vocabulary(stored: StoredHead, args: TextModelArgs) -> None:
    """Compare the vocabulary with that of the model that a head was trained with.

    No tensor of a head tells its size, because a head has no embeddings.
    """
    found = text_config(stored.config).get("vocab_size")
    if found is not None and found != args.vocab_size:
        raise stored.error(
            f"the config.json beside it has a vocab_size of {found}, and the model of "
            f"{args.vocab_size}, so it is the head of another model. The right one may "
            "be passed with --mtp PATH."
        )


def _check_numbers(stored: StoredHead, weights: Tensors) -> None:
    """Raise SpeculationError if there is a NaN or an infinity; it spoils every draft.

    This precedes the check of the norms, whose means such values would falsify.
    """
    names = [n for n, x in weights.items() if mx.issubdtype(x.dtype, mx.floating)]
    try:
        finite = mx.stack([mx.isfinite(weights[name]).all() for name in names]).tolist()
    except RuntimeError as exc:
        raise stored.error(f"its tensors cannot be read: {exc}") from exc
    damaged = [name for name, is_ok in zip(names, finite, strict=True) if not is_ok]
    if damaged:
        raise stored.error(
            _list("some of its values are not finite numbers", damaged)
            + "It is damaged: download it again, or pass another head with --mtp PATH."
        )


def _check_tensors(stored: StoredHead, head: MTPHead, weights: Tensors) -> None:
    """Compare names and shapes with those of the head before any layer is quantised.

    The shape of a quantised weight differs in the last axis only.
    """
    expected = dict(tree_flatten(head.parameters()))
    quantized = {name[:-7] for name in weights if name.endswith(".scales")}
    missing = sorted(expected.keys() - weights.keys())
    parameters = {
        f"{path}.{name}" for path in quantized for name in ("scales", "biases")
    }
    unexpected = sorted(weights.keys() - expected.keys() - parameters)
    misshaped = [
        f"{name} {list(weights[name].shape)} in place of {list(x.shape)}"
        for name, x in expected.items()
        if name in weights and not _fits(weights[name], x, name[:-7] in quantized)
    ]
    if missing or unexpected or misshaped:
        raise stored.error(
            "its tensors are not those of a head for this model. "
            + _list("Missing", missing)
            + _list("Not known", unexpected)
            + _list("Of another shape", misshaped)
            + "Is it the head of another model? The right one may be passed with "
            "--mtp PATH."
        )


def _fits(found: mx.array, expected: mx.array, is_packed: bool) -> bool:
    axes = slice(-1 if is_packed else None)
    return found.ndim == expected.ndim and found.shape[axes] == expected.shape[axes]


def _list(what: str, names: list[str], num_shown: int = 4) -> str:
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return f"{what}: {', '.join(names[:num_shown])}{more}. " if names else ""
