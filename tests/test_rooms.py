"""The package's folders import each other in one direction, and by their doors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_optiq_ext

PACKAGE = Path(mlx_optiq_ext.__file__).parent

# What the modules of a folder may import; each names all folders that it may.
BELOW = {
    "grammars": set(),
    "rollback": set(),
    "heads": set(),
    "assistants": set(),
    "mixins": {"heads", "assistants"},
    "drafters": {"rollback", "mixins", "heads", "assistants"},
}
BELOW["decoding"] = {"drafters", "grammars", *BELOW["drafters"]}
BELOW["serving"] = {"decoding", *BELOW["decoding"]}
BELOW["lab"] = set()
BELOW["patches"] = {"serving", *BELOW["serving"]}
BELOW["cli"] = {"lab", "patches", *BELOW["patches"]}


def imports() -> Iterator[tuple[str, str, str]]:
    """File, and the folder and the module in it that the file imports."""
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = list(path.relative_to(PACKAGE).parts[: -node.level])
                if node.level == 0:
                    package, *base = (node.module or "").split(".")
                    if package != PACKAGE.name:
                        continue
                    yield from _split(path, base, node)
                else:
                    parts = (node.module or "").split(".") if node.module else []
                    yield from _split(path, base + parts, node)


def _split(
    path: Path, parts: list[str], node: ast.ImportFrom
) -> Iterator[tuple[str, str, str]]:
    file = str(path.relative_to(PACKAGE))
    if parts:
        yield file, parts[0], ".".join(parts[1:])
    else:
        for name in node.names:
            yield file, name.name, ""


ALL = [x for x in imports() if (PACKAGE / x[1]).is_dir()]


def test_imports_are_found() -> None:
    assert ("decoding/_loop.py", "drafters", "") in ALL


@pytest.mark.parametrize("room", BELOW)
def test_imports_go_down(room: str) -> None:
    found = {(file, other) for file, other, _ in ALL if file.startswith(f"{room}/")}
    allowed = BELOW[room] | {room}
    wrong = {(file, other) for file, other in found if other not in allowed}
    assert not wrong


@pytest.mark.parametrize("room", BELOW)
def test_nobody_reaches_past_a_door(room: str) -> None:
    wrong = {
        (file, f"{other}.{module}")
        for file, other, module in ALL
        if file.startswith(f"{room}/")
        and other != room
        and any(part.startswith("_") for part in module.split("."))
    }
    assert not wrong
