"""What the command line of the Lab asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LabOptions:
    """How a Lab is started.

    Args:
        model (str, optional): A folder or Hub id that is served at once.
        folders (tuple): Folders in which models are looked for, besides the Hub's
          cache. Each may be a model itself or hold some, up to two levels deep.
        host (str): An address of this machine only.
        port (int): Of the page; 0 takes a free one.
        opens_browser (bool): Whether a browser is opened.
    """

    model: str | None = None
    folders: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    opens_browser: bool = True
