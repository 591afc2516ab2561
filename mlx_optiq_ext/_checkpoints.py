"""Finds the files of a drafter's checkpoint, on disk or on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ._errors import SpeculationError

CONFIG = "config.json"
Source = str | os.PathLike[str]


def read_config(source: Source) -> dict[str, Any]:
    """Read the configuration of a checkpoint, which is empty if there is none.

    Args:
        source (str or Path): A folder or a Hub id.

    Raises:
        SpeculationError: If there is no such place, or its configuration is broken.
    """
    path = Path(source).expanduser()
    if path.exists():
        return read_json(path / CONFIG)
    try:
        file = hf_hub_download(str(source), CONFIG)
    except Exception as exc:  # The client's errors have no base class in common.
        is_there = isinstance(exc, EntryNotFoundError)
        if is_there and not isinstance(exc, LocalEntryNotFoundError):
            return {}
        raise _not_found(source, exc) from exc
    return read_json(Path(file))


def find_folder(source: Source) -> Path:
    """Find the folder of a whole checkpoint, and download it if it is on the Hub.

    Args:
        source (str or Path): A folder or a Hub id.

    Raises:
        SpeculationError: If there is no such place.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    patterns = ["*.json", "model*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as exc:
        raise _not_found(source, exc) from exc


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file, which is empty if there is no such file.

    Args:
        file (Path): A file on disk.

    Raises:
        SpeculationError: If the file cannot be read or does not hold a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
    except (OSError, ValueError) as exc:
        raise SpeculationError(f"Cannot speculate: {file} is broken: {exc}.") from exc
    return content


def _not_found(source: Source, exc: Exception) -> SpeculationError:
    return SpeculationError(
        f"Cannot speculate: {os.fspath(source)} is no folder here, and not on the Hub "
        f"either, or the Hub cannot be reached ({type(exc).__name__})."
    )
