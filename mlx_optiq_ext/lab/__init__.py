"""A page in the browser to start a server, choose its drafter and watch it work.

The room knows servers by HTTP and its children by their command lines only: nothing
here imports mlx, mlx-lm or the rooms that decode.
"""

from __future__ import annotations

from collections.abc import Callable

from ._options import LabOptions

__all__ = ["LabOptions", "serve"]


def serve(options: LabOptions, announce: Callable[[str], None]) -> None:
    """Serve the Lab until it is interrupted.

    Args:
        options (LabOptions): What it shows, and where.
        announce (Callable): Called with the address, which holds the token.

    Raises:
        ModuleNotFoundError: If a package of the extra ``lab`` is missing.
        OSError: If the port is in use.
        ValueError: If there is no such model, or others could reach the address.
    """
    from ._serve import serve

    serve(options, announce)
