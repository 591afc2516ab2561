"""Names the releases of mlx-lm that the patch table was written for."""

from __future__ import annotations

from importlib import metadata

# All the tests pass with each of these, from the oldest to the newest; see
# scripts/test_versions.py. pyproject.toml requires the same.
SUPPORTED = ("0.32.0", "0.32.1", "0.32.2")


def unsupported_reason() -> str | None:
    """Say why the installed mlx-lm cannot be patched; None means that it can be."""
    listed = f"supported are {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]}"
    try:
        found = metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        return f"no installed mlx-lm was found, {listed}"
    return None if found in SUPPORTED else f"mlx-lm {found} is installed, {listed}"
