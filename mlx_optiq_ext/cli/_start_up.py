"""Finds out whether a fresh interpreter runs the start-up file, and if not, why."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import _bootstrap
from ._commands import command

START_UP_FILE = "mlx_optiq_ext.pth"

_PROBE = """
import json, site, sys
folders = site.getsitepackages()
if site.ENABLE_USER_SITE:
    folders.append(site.getusersitepackages())
modules = [type(entry).__module__ for entry in sys.meta_path]
print(json.dumps([folders, "mlx_optiq_ext._bootstrap" in modules]))
"""

_IMPORT = "import mlx_optiq_ext before mlx_lm"
_PIP = (sys.executable, "-m", "pip")
_INSTALL = command(*_PIP, "install", "--force-reinstall", "mlx-optiq-ext")

_OPTIONS = {
    "-I": "isolated",
    "-S": "no_site",
    "-s": "no_user_site",
    "-E": "ignore_environment",
}


@dataclass(frozen=True, slots=True)
class StartUp:
    """The way in which a fresh interpreter treats the start-up file.

    Attributes:
        active: Whether the interpreter runs the start-up file.
        reason: The reason why it does not, None if it does.
        cure: What the user can do about it, None if nothing is wrong.
    """

    active: bool
    reason: str | None = None
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """The facts about a fresh interpreter that explain what it does.

    Attributes:
        folders: The folders in which it reads start-up files.
        package_folder: The folder that this package was imported from.
        options: The options of this interpreter, which the fresh one was given.
        errors: The text that the fresh one wrote to its standard error.
        hidden: The start-up files that have the macOS flag for hidden files.
    """

    folders: tuple[Path, ...]
    package_folder: Path
    options: tuple[str, ...] = ()
    errors: str = ""
    hidden: frozenset[Path] = frozenset()


def inspect_start_up() -> StartUp:
    """Start an interpreter as this one was started, and look at it."""
    options = [name for name, flag in _OPTIONS.items() if getattr(sys.flags, flag)]
    probe = [sys.executable, *options, "-c", _PROBE]
    fresh = subprocess.run(probe, capture_output=True, text=True, check=True)
    names, active = json.loads(fresh.stdout.splitlines()[-1])
    if active:
        return StartUp(active=True)
    folders = tuple(map(Path, names))
    hidden = [path for path in _files(folders) if is_hidden(path.stat())]
    return explain(
        Observation(
            folders=folders,
            package_folder=Path(__file__).parents[2],
            options=tuple(options),
            errors=fresh.stderr,
            hidden=frozenset(hidden),
        )
    )


def explain(observation: Observation) -> StartUp:
    """Say why an interpreter that was observed does not run the start-up file."""
    if _bootstrap.switched_off():
        return StartUp(False, "MLX_OPTIQ_EXT=0 is set", "unset MLX_OPTIQ_EXT")
    if "-S" in observation.options:
        reason = "Python runs with -S, which skips start-up files"
        return StartUp(False, reason, _IMPORT)
    if files := _files(observation.folders):
        return _explain_file(files[0], observation)
    return _explain_folder(observation)


def _files(folders: Iterable[Path]) -> list[Path]:
    files = (folder / START_UP_FILE for folder in folders)
    return [path for path in files if path.exists()]


def _explain_file(path: Path, observation: Observation) -> StartUp:
    if path in observation.hidden:
        reason = f"macOS marks {path} as hidden, and Python skips hidden files"
        return StartUp(False, reason, command("chflags", "-R", "nohidden", sys.prefix))
    detail = observation.errors.strip() or "no error was shown"
    return StartUp(False, f"Python read {path} in vain: {detail}", _INSTALL)


def _explain_folder(observation: Observation) -> StartUp:
    folder = observation.package_folder
    if not (folder / START_UP_FILE).exists():
        searched = ", ".join(map(str, observation.folders))
        reason = f"{START_UP_FILE} is not installed in {searched}"
        return StartUp(False, reason, f"{_INSTALL}, or {_IMPORT}")
    started = f" {' '.join(observation.options)}" if observation.options else ""
    reason = f"Python{started} reads no start-up files in {folder}"
    return StartUp(False, f"{reason} (pip install --target, PYTHONPATH)", _IMPORT)


def is_hidden(status: object) -> bool:
    """Tell whether a file's `os.stat` result has the macOS flag that hides it."""
    return bool(getattr(status, "st_flags", 0) & stat.UF_HIDDEN)
