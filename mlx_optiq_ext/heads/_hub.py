"""Fetches the few files of a Hub repository that hold a head."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

from .._errors import SpeculationError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HubRepo:
    """A repository on the Hub, at a revision, in a local cache."""

    repo_id: str
    revision: str | None = None
    cache_dir: Path | None = None


def parse_repo_id(name: str) -> HubRepo | None:
    """Return the repository that ``ORG/NAME`` names, None for other text."""
    return HubRepo(name) if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def repo_of_snapshot(folder: Path) -> HubRepo | None:
    """Return the repository that a folder is the cached snapshot of, if it is one."""
    repo_folder = folder.parent.parent
    kind, *names = repo_folder.name.split("--")
    if folder.parent.name != "snapshots" or kind != "models" or not names:
        return None
    return HubRepo("/".join(names), folder.name, repo_folder.parent)


def in_hub_cache(folder: Path) -> bool:
    """Tell whether a folder is a cached snapshot, which only the client changes."""
    return repo_of_snapshot(folder.absolute()) is not None


def cached_snapshot(repo: HubRepo) -> Path | None:
    """Find the folder of a repository in the cache, without asking the Hub."""
    config = try_to_load_from_cache(repo.repo_id, CONFIG, repo.cache_dir, repo.revision)
    return Path(config).parent if isinstance(config, str) else None


def fetch(repo: HubRepo, choose_files: Callable[[Path, list[str]], list[str]]) -> Path:
    """Download the configuration of a repository, then the files chosen by it.

    Args:
        repo (HubRepo): The repository.
        choose_files (Callable): A function that gets a folder with the configuration
          and the names of all files in the repository, and returns the names of those
          that are wanted.

    Returns:
        Path: The snapshot, with those files in it.

    Raises:
        SpeculationError: If the Hub cannot be reached or does not have the repository.
    """
    try:
        names = HfApi().list_repo_files(repo.repo_id, revision=repo.revision)
        folder = _download(repo, [CONFIG, INDEX])
    except Exception as exc:  # The client's errors have no base class in common.
        raise _not_fetched(repo, "its list of files") from exc
    wanted = choose_files(folder, names)
    try:
        return _download(repo, wanted) if wanted else folder
    except Exception as exc:
        raise _not_fetched(repo, ", ".join(wanted)) from exc


def _download(repo: HubRepo, names: list[str]) -> Path:
    folder = snapshot_download(
        repo.repo_id,
        revision=repo.revision,
        cache_dir=repo.cache_dir,
        allow_patterns=names,
    )
    return Path(folder)


def _not_fetched(repo: HubRepo, what: str) -> SpeculationError:
    return SpeculationError(
        f"Cannot speculate: no MTP head of {repo.repo_id}, revision "
        f"{repo.revision or 'main'}, is in the local cache, and {what} could not be "
        "fetched from the Hub. Go online once, or pass a local head with --mtp PATH."
    )
