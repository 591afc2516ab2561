"""Describes the machine, backend and versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from .. import __version__
from ._backend import backend_name, device_name

MAPS = Path("/proc/self/maps")


def describe_machine() -> dict[str, str]:
    """Describe the machine, the backend, the versions and, on a CPU, the BLAS."""
    description = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": f"{backend_name()} ({device_name()})",
        "versions": _versions(),
    }
    if backend_name() == "cpu":
        description["BLAS"] = blas_name()
    return description


def _versions() -> str:
    packages = [f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm")]
    python = f"Python {platform.python_version()}"
    return ", ".join([f"mlx-optiq-ext {__version__}", *packages, python])


def blas_name() -> str:
    """Name the BLAS library of this process, as far as the system tells."""
    if platform.system() == "Darwin":
        return "Accelerate"
    names = loaded_libraries(MAPS.read_text()) if MAPS.exists() else []
    # NumPy brings a copy of its own, named "scipy", which mlx does not use.
    found = [n for n in names if re.search("blas|mkl|blis", n) and "scipy" not in n]
    # A preloaded library takes precedence over the one that mlx brings along.
    forced = os.getenv("LD_PRELOAD", "").replace(":", " ").split()
    preloaded = {Path(path).resolve().name for path in forced}
    found.sort(key=lambda name: name not in preloaded)
    return next(iter(found), "unknown")


def loaded_libraries(maps: str) -> list[str]:
    """List the names of the files that a process has mapped, each once.

    Args:
        maps (str): The text of ``/proc/PID/maps``.
    """
    paths = (line.split(maxsplit=5)[5:] for line in maps.splitlines())
    return list(dict.fromkeys(Path(path[0]).name for path in paths if path))
