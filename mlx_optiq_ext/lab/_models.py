"""The models of this machine: the Hub's cache, the demo models, folders that are named.

Only files of configuration are read here, and sizes; what weights hold is for
``mlx-optiq-ext doctor`` to say. Everything that a page may name is looked up in this
list, so that no path of a request ever reaches the file system.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import constants

PACKAGE = Path(__file__).parents[1]
# By what a page calls them: their folder, and what a shell may call it.
DEMOS = {
    "demo/qwen": (PACKAGE / "demo_model", '"$(mlx-optiq-ext demo --path)"'),
    "demo/gemma": (
        PACKAGE / "demo_gemma",
        '"$(mlx-optiq-ext demo --family gemma --path)"',
    ),
    "demo/gemma-assistant": (
        PACKAGE / "demo_gemma" / "assistant",
        '"$(mlx-optiq-ext demo --family gemma --path)/assistant"',
    ),
}
DEPTH = 2
# The last two are for heads that are stored beside a model.
WEIGHTS = ("*.safetensors", "optiq/*.safetensors", "mtp/*.safetensors")
# What generation_config.json calls the settings that the server's flags set.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MODEL, ASSISTANT, HEAD = "model", "assistant", "head"

Version = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint on this machine.

    Args:
        name (str): By which pages and requests mean it.
        source (str): What a command line says for it: a folder or a Hub id.
        folder (Path): With its files.
        kind (str): ``model``, ``assistant`` or ``head``.
        model_type (str): That its configuration names.
        num_bytes (int): Of its weights on disk.
        bits (int, optional): Of quantised weights.
        sampling (dict): What the model recommends, by the names of ``SAMPLING``.
        is_greedy (bool): Whether the model recommends not to sample.
    """

    name: str
    source: str
    folder: Path
    kind: str
    model_type: str
    num_bytes: int
    bits: int | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    is_greedy: bool = False

    @property
    def shell_source(self) -> str:
        """The source, as a shell takes it."""
        return DEMOS[self.name][1] if self.name in DEMOS else shlex.quote(self.source)

    @property
    def version(self) -> Version:
        """Another one whenever files of the model have changed."""
        files = [self.folder / "config.json", *_weights(self.folder)]
        found = [file.stat() for file in files if file.is_file()]
        return tuple((each.st_mtime_ns, each.st_size) for each in found)

    def as_json(self) -> dict[str, Any]:
        """What a page is told."""
        return asdict(self) | {"folder": str(self.folder)}


def find_models(folders: Iterable[Path] = ()) -> dict[str, LocalModel]:
    """The models of this machine by name, those that were asked for first.

    Args:
        folders (Iterable): Folders that are models or hold some.
    """
    places = [
        *((str(path), str(path), path) for path in _in_folders(folders)),
        *_in_cache(Path(constants.HF_HUB_CACHE)),
        *((name, str(path), path) for name, (path, _) in DEMOS.items()),
    ]
    found: dict[str, LocalModel] = {}
    for name, source, folder in places:
        model = _read(name, source, folder)
        if model is not None:
            found.setdefault(name, model)
    return found


def _in_folders(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from _below(folder.expanduser().resolve(), DEPTH)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.json").is_file():
        yield folder
    if depth:
        for child in _folders_in(folder):
            yield from _below(child, depth - 1)


def _folders_in(folder: Path) -> list[Path]:
    """Those that are not hidden, none if the folder cannot be read."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in found if path.is_dir() and not path.name.startswith(".")]


def _in_cache(cache: Path) -> Iterator[tuple[str, str, Path]]:
    for repo in sorted(cache.glob("models--*--*")):
        name = "/".join(repo.name.split("--")[1:])
        try:
            commit = (repo / "refs" / "main").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        snapshot = repo / "snapshots" / commit
        if commit.isalnum() and (snapshot / "config.json").is_file():
            yield name, name, snapshot


def _read(name: str, source: str, folder: Path) -> LocalModel | None:
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    weights = _weights(folder)
    if not isinstance(model_type, str) or not weights:
        return None
    generation = _read_json(folder / "generation_config.json")
    numbers = {key: generation.get(key) for key in SAMPLING}
    return LocalModel(
        name=name,
        source=source,
        folder=folder,
        kind=_kind(model_type),
        model_type=model_type,
        num_bytes=sum(file.stat().st_size for file in weights),
        bits=_bits(config),
        sampling={name: v for name, v in numbers.items() if _is_number(v)},
        is_greedy=generation.get("do_sample") is False,
    )


def _weights(folder: Path) -> list[Path]:
    found = (file for glob in WEIGHTS for file in sorted(folder.glob(glob)))
    # What is left of a download in the cache may be links to nowhere.
    return [file for file in found if file.is_file()]


def _kind(model_type: str) -> str:
    if model_type.endswith("_assistant"):
        return ASSISTANT
    return HEAD if model_type.endswith("_mtp") else MODEL


def _bits(config: dict[str, Any]) -> int | None:
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    return bits if isinstance(bits, int) else None


def _is_number(value: Any) -> TypeGuard[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
