"""Which releases of mlx-lm the patch table was written for."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.32.0,<0.33"


def unsupported_reason() -> str | None:
    """Why the installed mlx-lm cannot be patched, None if it can."""
    try:
        found = metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        return f"no installed mlx-lm was found, mlx-lm{SUPPORTED} is supported"
    if SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        return None
    return f"mlx-lm {found} is installed, mlx-lm{SUPPORTED} is supported"
