"""Tells whether the norms of a stored head are as ``nn.RMSNorm`` takes them.

Qwen3.5 multiplies with ``1 + weight`` and its checkpoints hold ``weight``: they are
*zero-centred*. Converters add the one, which makes them *absolute*, or forget the head.
Mistaking one for the other changes no shape and leaves no draft token accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ._locate import StoredHead, Tensors

_ZERO_CENTRED = "zero-centred"
_ABSOLUTE = "absolute"

_LAYER = "layers.0."
# A mean below the first number is clearly zero-centred, above the second clearly
# absolute. Published zero-centred heads have, pair by pair, means of 0.0 to 0.4, 0.7 to
# 0.8 and -0.7 to -0.1, absolute ones one more. Those of the last norm, 1.2 to 2.6 and
# one more, overlap: a large one tells nothing.
_CLEAR_MEANS = {
    _LAYER + "input_layernorm.weight": (0.5, 0.7),
    _LAYER + "post_attention_layernorm.weight": (0.5, 0.7),
    _LAYER + "self_attn.q_norm.weight": (0.8, 1.2),
    _LAYER + "self_attn.k_norm.weight": (0.8, 1.2),
    "pre_fc_norm_embedding.weight": (0.15, 0.7),
    "pre_fc_norm_hidden.weight": (0.15, 0.7),
    "norm.weight": (0.5, float("inf")),
}


class Evidence(NamedTuple):
    """One observation, and the convention of norms that it tells."""

    convention: str
    observation: str


def restore_norms(stored: StoredHead, weights: Tensors) -> Tensors:
    """Make the norms of a head absolute.

    Args:
        stored (StoredHead): Tells how the head is stored.
        weights (dict): All tensors of the head, under the names of ``MTPHead``.

    Raises:
        SpeculationError: If the convention of the norms is not certain.
    """
    if told_norms(stored, weights).convention == _ABSOLUTE:
        return weights
    return weights | {name: weights[name] + 1 for name in _CLEAR_MEANS}


def told_norms(stored: StoredHead, weights: Tensors) -> Evidence:
    """Find the convention of a head's norms, with the best evidence for it.

    What is stored beside the head decides, and otherwise the norms of its layer; the
    other norms are below 1 in either convention. All clear evidence must agree.

    Args:
        stored (StoredHead): Tells how the head is stored.
        weights (dict): All tensors of the head.

    Raises:
        SpeculationError: If the evidence is contradictory, or there is none.
    """
    beside = _stored_evidence(stored)
    by_norm = _clear_norms(weights)
    evidence = [*beside, *by_norm.values()]
    conventions = {item.convention for item in evidence}
    if len(conventions) > 1:
        raise stored.error(_contradiction(evidence))
    if not beside and not any(name.startswith(_LAYER) for name in by_norm):
        raise stored.error(
            "its norms may be zero-centred, as Qwen stores them, or absolute, as MLX "
            f"needs them. The means of {', '.join(_CLEAR_MEANS)} do not tell, nor does "
            "anything in its files. Pass the original model's head with --mtp PATH."
        )
    return evidence[0]


def _stored_evidence(stored: StoredHead) -> list[Evidence]:
    if stored.trunk_is_raw is not None:
        layout, convention = (
            ("that of the original model", _ZERO_CENTRED)
            if stored.trunk_is_raw
            else ("converted", _ABSOLUTE)
        )
        return [Evidence(convention, f"the trunk stored with it is {layout}")]
    if not stored.is_prefixed:
        return [Evidence(_ABSOLUTE, "its names lack the prefix of the original")]
    if stored.is_mlx_format:
        return [Evidence(_ABSOLUTE, "its files are marked as written for MLX")]
    return []


def _clear_norms(weights: Tensors) -> dict[str, Evidence]:
    means = mx.stack([weights[name].astype(mx.float32).mean() for name in _CLEAR_MEANS])
    evidence = {}
    for (name, (low, high)), mean in zip(
        _CLEAR_MEANS.items(), means.tolist(), strict=True
    ):
        if mean < low or mean > high:
            convention = _ZERO_CENTRED if mean < low else _ABSOLUTE
            evidence[name] = Evidence(convention, f"{name} has a mean of {mean:.2f}")
    return evidence


def _contradiction(evidence: list[Evidence]) -> str:
    sides = {
        convention: ", ".join(
            e.observation for e in evidence if e.convention == convention
        )
        for convention in (_ZERO_CENTRED, _ABSOLUTE)
    }
    told = "; but ".join(f"{side}: {name} norms" for name, side in sides.items())
    return (
        f"its norms cannot be trusted, as they are of two conventions: {told}. Pass a "
        "head from another place, such as the original model, with --mtp PATH."
    )
