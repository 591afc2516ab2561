"""Brings a head along when its model is converted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._head import MTPHead
from ._host import Host, dequantize_head, quantize_head
from ._load import build_head
from ._locate import search


def carry_head(
    sources: Iterable[str | Path], host: Host, config: dict[str, Any]
) -> MTPHead | None:
    """Load the head of a model in the precision that the model is written in.

    Layers of the head that are stored quantised stay as they are, as those of the model
    do, unless the model was quantised and is written in full.

    Args:
        sources (Iterable): Folders, files or Hub ids. The first with a head is read.
        host (Host): The model that is written.
        config (dict): The configuration that is written with it.

    Returns:
        MTPHead: The head, or None if there is none in any of the sources.

    Raises:
        SpeculationError: If there is a head that cannot be that of the model, or a
          source cannot be looked into.
    """
    for source in sources:
        _, stored = search(source)
        if stored is None:
            continue
        head = build_head(stored, host.args, host.dtype)
        if "quantization" in stored.config and "quantization" not in config:
            dequantize_head(head, host.dtype)
        return quantize_head(head, host.quantization)
    return None
