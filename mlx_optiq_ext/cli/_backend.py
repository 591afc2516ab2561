"""Names the backend and the device that MLX computes with on this machine."""

from __future__ import annotations

import mlx.core as mx


def backend_name() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_name() -> str:
    return mx.device_info().get("device_name", "unknown device")
