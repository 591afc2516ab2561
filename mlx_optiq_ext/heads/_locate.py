"""Finds the tensors of a head, on disk or on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._errors import SpeculationError
from . import _hub
from ._config import block

SIDECARS = (
    "optiq/mtp.safetensors",
    "mtp.safetensors",
    "mtp/weights.safetensors",
    "model-mtp.safetensors",
)
_PREFIX = re.compile(r"(?:(?:model|language_model)\.)*mtp\.")
_UNPREFIXED = "pre_fc_norm_hidden.weight"  # Only MTP heads have such a tensor.
_CONVOLUTION = "conv1d.weight"

Tensors = dict[str, mx.array]
# This holds the arrays and the metadata of files.
Loaded = dict[Path, tuple[Tensors, dict[str, str]]]


@dataclass(frozen=True)
class StoredHead:
    """A head as it is stored, whose arrays are read from the files when they are used.

    Args:
        tensors (dict): Arrays by their name without prefix, such as ``fc.weight``.
        files (tuple): The files that they are in.
        config (dict): The ``config.json`` beside them, empty if there is none.
        is_prefixed (bool): Whether the stored names begin with ``mtp.``.
        is_mlx_format (bool): Whether the files say that an MLX tool wrote them.
        trunk_is_raw (bool, optional): Whether the trunk stored with the head has the
          layout of the original checkpoint; None without such a trunk.
    """

    tensors: Tensors
    files: tuple[Path, ...]
    config: dict[str, Any]
    is_prefixed: bool
    is_mlx_format: bool
    trunk_is_raw: bool | None

    def error(self, reason: str) -> SpeculationError:
        """Make the error that says why this head cannot be used."""
        files = ", ".join(map(str, self.files))
        return SpeculationError(
            f"Cannot speculate with the MTP head in {files}: {reason}"
        )


def find_head(source: str | Path) -> StoredHead:
    """Find the head of a model.

    Args:
        source (str or Path): A model or head folder, a ``.safetensors`` file or a Hub
          id.

    Raises:
        SpeculationError: If there is none, or its files cannot be read.
    """
    path, head = search(source)
    if head is None:
        raise _not_found(path)
    return head


def search(source: str | Path) -> tuple[Path, StoredHead | None]:
    """Search a place for a head.

    Args:
        source (str or Path): A model or head folder, a ``.safetensors`` file or a Hub
          id.

    Returns:
        tuple: The file or folder that was searched last, and the head or None.

    Raises:
        SpeculationError: If there is no such place, or its files cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        config = _read_json(path.with_name(_hub.CONFIG), default={})
        return path, _read([path], config)
    return _search_folder(source, path)


def has_head(source: str | Path) -> bool:
    """Tell whether a place has an MTP head, be it a good one or not.

    Args:
        source (str or Path): A model or head folder, a ``.safetensors`` file or a Hub
          id.

    Raises:
        SpeculationError: If there is no such place, or its files cannot be read.
    """
    return search(source)[1] is not None


def sidecar_names(config: Mapping[str, Any]) -> list[str]:
    """List the files beside a model that may hold its head, the most specific first."""
    declared = block(config, "mlx_lm_extra_tensors").get("mtp_file")
    if isinstance(declared, str) and declared:
        return [declared, *SIDECARS]
    return [*SIDECARS]


def indexed_shards(folder: Path) -> list[str]:
    """List the shards that hold the head of a model, as its index says."""
    weight_map = _read_weight_map(folder)
    return sorted({file for name, file in weight_map.items() if _PREFIX.match(name)})


def files_to_fetch(folder: Path, repo_files: Iterable[str]) -> list[str]:
    """Choose the files of a repository that hold its head, without their content.

    Args:
        folder (Path): Holds the configuration and, if there is one, the index.
        repo_files (Iterable): The names of all files in the repository.
    """
    names = sorted(repo_files)
    for sidecar in sidecar_names(_read_json(folder / _hub.CONFIG)):
        if sidecar in names:
            return [sidecar]
    if _hub.INDEX in names:
        return indexed_shards(folder)
    return [name for name in names if re.fullmatch(r"[^/]*\.safetensors", name)]


def _search_folder(source: str | Path, path: Path) -> tuple[Path, StoredHead | None]:
    """Search a folder, then the repository that it is, or may be, the cache of."""
    repo = _hub.repo_of_snapshot(path)
    folder = path if path.is_dir() else None
    if not folder and (repo := _hub.parse_repo_id(str(source))):
        folder = _hub.cached_snapshot(repo)
    if folder and (head := _search(folder)):
        return folder, head
    if repo:
        folder = _hub.fetch(repo, files_to_fetch)
        return folder, _search(folder)
    if folder:
        return folder, None
    raise SpeculationError(
        f"Cannot speculate: {source} is neither a folder or .safetensors file with an "
        "MTP head nor a Hub id (ORG/NAME)."
    )


def _search(folder: Path) -> StoredHead | None:
    config = _read_json(folder / _hub.CONFIG)
    for name in sidecar_names(config):
        if (folder / name).is_file() and (head := _read([folder / name], config)):
            return head
    if shards := indexed_shards(folder):
        files = [folder / name for name in shards]
        if not all(file.is_file() for file in files):
            return None  # The missing shard may still be on the Hub.
        return _read(files, config, beside=_files_with_convolutions(folder))
    return _search_unindexed(folder, config)


def _files_with_convolutions(folder: Path) -> list[Path]:
    """Find a shard that tells how the trunk is stored; the list may be empty."""
    weight_map = _read_weight_map(folder).items()
    names = (file for name, file in weight_map if name.endswith(_CONVOLUTION))
    return [folder / name for name in islice(names, 1)]


def _search_unindexed(folder: Path, config: dict[str, Any]) -> StoredHead | None:
    """Search the files of a folder, those that mlx-lm would load before any other."""
    for files in ([folder / "model.safetensors"], folder.glob("model*.safetensors")):
        present = sorted(file for file in files if file.is_file())
        if head := _read(present, config, beside=present):
            return head
    others = sorted(folder.glob("*.safetensors"))
    loaded = _load_readable(others)
    head = _stored_head(loaded, config, loaded)
    if head is None:
        for file in others:
            _load(file)  # Raises what is wrong with the one that may have held it.
    return head


def _read(
    files: Iterable[Path], config: dict[str, Any], beside: Iterable[Path] = ()
) -> StoredHead | None:
    """Read the head in some files, all of which have to be whole.

    Args:
        files (Iterable): The files that may hold the head.
        config (dict): The configuration beside them.
        beside (Iterable): Files that may tell how the trunk is stored. They need not be
          whole.
    """
    loaded = {file: _load(file) for file in files}
    return _stored_head(loaded, config, _load_readable(beside) | loaded)


def _stored_head(
    loaded: Loaded, config: dict[str, Any], with_trunk: Loaded
) -> StoredHead | None:
    tensors = {file: _without_prefix(arrays) for file, (arrays, _) in loaded.items()}
    is_prefixed = any(tensors.values())
    if not is_prefixed and any(_UNPREFIXED in arrays for arrays, _ in loaded.values()):
        tensors = {file: arrays for file, (arrays, _) in loaded.items()}
    holders = {file: arrays for file, arrays in tensors.items() if arrays}
    if not holders:
        return None
    return StoredHead(
        tensors=_merge(holders),
        files=tuple(holders),
        config=config,
        is_prefixed=is_prefixed,
        is_mlx_format=all(loaded[file][1].get("format") == "mlx" for file in holders),
        trunk_is_raw=_trunk_is_raw(with_trunk, holders),
    )


def _merge(holders: dict[Path, Tensors]) -> Tensors:
    merged: Tensors = {}
    homes: dict[str, Path] = {}
    for file, arrays in holders.items():
        for name, array in arrays.items():
            if name in merged:
                raise SpeculationError(
                    f"Cannot speculate: of the MTP head, {name} is in both "
                    f"{homes[name]} and {file}. Remove the file that is not the "
                    "model's, or pass the right one with --mtp PATH."
                )
            merged[name], homes[name] = array, file
    return merged


def _without_prefix(arrays: Tensors) -> Tensors:
    matches = {name: _PREFIX.match(name) for name in arrays}
    return {name[m.end() :]: arrays[name] for name, m in matches.items() if m}


def _trunk_is_raw(loaded: Loaded, holders: Iterable[Path]) -> bool | None:
    """Tell how the trunk is stored, by convolutions, which every converter transposes.

    A raw trunk means that nothing was converted. A converted one tells nothing about a
    head in another file, which may have been added later.
    """
    is_raw = {
        file: [x.shape[-1] != 1 for n, x in arrays.items() if n.endswith(_CONVOLUTION)]
        for file, (arrays, _) in loaded.items()
    }
    if any(any(shapes) for shapes in is_raw.values()):
        return True
    return False if any(is_raw[file] for file in holders) else None


def _load_readable(files: Iterable[Path]) -> Loaded:
    """Load the files that can be read, and leave out the others."""
    loaded: Loaded = {}
    for file in files:
        with suppress(SpeculationError):
            loaded[file] = _load(file)
    return loaded


def _load(file: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        arrays, metadata = mx.load(str(file), return_metadata=True)
    except (RuntimeError, ValueError, TypeError) as exc:
        raise SpeculationError(
            f"Cannot speculate: {file} should hold an MTP head but is not a complete "
            f"safetensors file ({exc}). Download it again, or pass another head with "
            "--mtp PATH."
        ) from exc
    return arrays, metadata


def _read_json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not file.exists():
        return default
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
    except (OSError, ValueError) as exc:
        raise _unreadable(file, exc) from exc
    return content


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Read the names of files by names of tensors; empty if a model has no index."""
    file = folder / _hub.INDEX
    found = _read_json(file, default={}).get("weight_map", {})
    is_map = isinstance(found, dict)
    if not is_map or not all(isinstance(name, str) for name in found.values()):
        raise _unreadable(file, "expected names of files by name of tensor")
    return found


def _unreadable(file: Path, reason: object) -> SpeculationError:
    return SpeculationError(
        f"Cannot speculate: {file} is needed to find the MTP head and cannot be "
        f"read ({reason})."
    )


def _not_found(path: Path) -> SpeculationError:
    names = [path.name]
    if path.is_dir():
        shards = [file.name for file in sorted(path.glob("*.safetensors"))]
        names = [*sidecar_names(_read_json(path / _hub.CONFIG)), *shards]
        if absent := [x for x in indexed_shards(path) if x not in shards]:
            return SpeculationError(
                f"Cannot speculate: {', '.join(absent)} with the MTP head should be in "
                f"{path}, says its {_hub.INDEX}. Download the missing files."
            )
    return SpeculationError(
        f"Cannot speculate: there is no MTP head in {path}: tensors named mtp.* or "
        f"language_model.mtp.* were looked for in {', '.join(dict.fromkeys(names))}. "
        "mlx_lm.convert leaves the head out where this extension is not on. Pass one "
        'with --mtp PATH (from Python mtp="PATH"): a .safetensors file, a folder, or a '
        "Hub id such as that of the original model; mlx-optiq-ext extract-mtp adds it "
        "to the model for good."
    )
