"""Describes how a head is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ._layouts import rename
from ._locate import StoredHead, find_head
from ._norms import told_norms

_EXPERTS = {
    ".experts.gate_up_proj": "experts fused, as Qwen stores them",
    ".experts.0.": "experts one by one",
    ".switch_mlp.": "experts stacked, as mlx-lm has them",
}


@dataclass(frozen=True)
class HeadDescription:
    """The way in which a head is stored.

    Args:
        files (tuple): The files that it is in.
        layout (str): How its tensors are named, and how its experts are stored.
        norms (str): ``zero-centred`` or ``absolute``.
        norms_told_by (str): The evidence for this convention.
    """

    files: tuple[Path, ...]
    layout: str
    norms: str
    norms_told_by: str


def describe_head(source: str | Path) -> HeadDescription:
    """Describe a head that can be loaded.

    Args:
        source (str or Path): A folder, ``.safetensors`` file or Hub id.

    Raises:
        SpeculationError: If there is no head, or if nothing tells the convention of
          its norms.
    """
    stored = find_head(source)
    evidence = told_norms(stored, rename(stored))
    return HeadDescription(
        stored.files, _layout(stored), evidence.convention, evidence.observation
    )


def _layout(stored: StoredHead) -> str:
    names = "mtp.* tensors" if stored.is_prefixed else "tensors without a prefix"
    for part, experts in _EXPERTS.items():
        if any(part in name for name in stored.tensors):
            return f"{len(stored.tensors)} {names}, {experts}"
    return f"{len(stored.tensors)} {names}, dense"
