"""Adds to mlx-lm's model classes what drafting needs, one module per family."""

from ._packed import pack_projections, packing, prepare_projections
from ._swap import add_mixin
from .gemma4 import SharedKVMixin, attach_shared_kv
from .qwen3_5 import MTPMixin, attach_mtp

__all__ = [
    "MTPMixin",
    "SharedKVMixin",
    "add_mixin",
    "attach_mtp",
    "attach_shared_kv",
    "pack_projections",
    "packing",
    "prepare_projections",
]
