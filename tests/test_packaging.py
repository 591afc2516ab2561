"""Both kinds of installation, their removal, and the metadata."""

from __future__ import annotations

import ast
import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from runpy import run_path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mlx_optiq_ext import __version__
from mlx_optiq_ext.patches import SUPPORTED

ROOT = Path(__file__).parents[1]
START_UP_FILES = {"mlx_optiq_ext.pth", "mlx_optiq_ext.start"}
IS_ARMED = """
import sys
print(any(type(entry).__name__ == "Trigger" for entry in sys.meta_path))
"""


class Environment:
    """A virtual environment that sees what this one has, except start-up files."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        # Only the .pth files of this folder itself are run.
        parent = sysconfig.get_path("purelib")
        (self.site_packages / "parent.pth").write_text(f"{parent}\n")

    def run(self, *arguments: str) -> str:
        environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_INPUT": "1"}
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [self.python, *arguments],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def install(self, *arguments: str) -> None:
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir")
        self.run("-m", "pip", "install", *options, *arguments)

    def files(self) -> set[str]:
        files = self.site_packages.rglob("*")
        return {str(path.relative_to(self.site_packages)) for path in files}

    def recorded(self) -> set[str]:
        (record,) = self.site_packages.glob("mlx_optiq_ext-*.dist-info/RECORD")
        with record.open(newline="") as lines:
            return {row[0] for row in csv.reader(lines)}


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what is built from, so that the build leaves no files behind."""
    copy = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mlx_optiq_ext", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["plain", "editable"])
def test_an_installation_is_active_and_leaves_nothing_when_removed(
    options, environment, source
):
    before = environment.files()
    environment.install(*options, str(source))
    assert environment.files() > START_UP_FILES
    assert environment.recorded() > START_UP_FILES
    assert environment.run("-c", IS_ARMED) == "True"
    assert environment.run("-S", "-c", IS_ARMED) == "False"
    code = "import mlx_optiq_ext; print(mlx_optiq_ext.__file__)"
    home = source if options else environment.site_packages
    assert Path(environment.run("-c", code)).parent == home / "mlx_optiq_ext"
    environment.run("-m", "pip", "uninstall", "--yes", "mlx-optiq-ext")
    assert environment.files() == before
    assert environment.run("-c", IS_ARMED) == "False"


def test_a_source_distribution_installs_the_start_up_files(environment, source):
    build = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True
    )
    (archive,) = source.glob("*.tar.gz")
    environment.install(str(archive))
    assert environment.recorded() > START_UP_FILES
    assert environment.run("-c", IS_ARMED) == "True"


def test_the_metadata_names_the_installed_version():
    assert metadata.version("mlx-optiq-ext") == __version__


def requirements(extra: str | None = None) -> dict[str, SpecifierSet]:
    """What the metadata requires, by the name of the distribution."""
    declared = map(Requirement, metadata.requires("mlx-optiq-ext"))
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in declared
        if (requirement.marker is None) == (extra is None)
        and (extra is None or requirement.marker.evaluate({"extra": extra}))
    }


def test_the_metadata_and_the_patch_table_support_the_same_mlx_lm():
    required = requirements()["mlx-lm"]
    assert required == SpecifierSet(f">={SUPPORTED[0]},<={SUPPORTED[-1]}")
    assert all(version in required for version in SUPPORTED)
    assert not any(f"{SUPPORTED[-1]}{more}" in required for more in (".1", ".post1"))


def test_the_versions_that_are_tested_are_those_that_are_supported():
    versions = run_path(str(ROOT / "scripts" / "test_versions.py"))["VERSIONS"]
    assert versions == SUPPORTED


def test_what_is_needed_at_run_time_is_what_mlx_lm_needs_and_two_packages():
    # mlx-lm itself imports huggingface_hub, which transformers brings to it.
    own = {"click", "wrapt"}
    assert set(requirements()) == own | {"huggingface-hub", "mlx", "mlx-lm"}


def imported_packages() -> set[str]:
    """The top-level packages that the modules of this package import."""
    found = set()
    for file in (ROOT / "mlx_optiq_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found - {"mlx_optiq_ext"} - sys.stdlib_module_names


def test_every_package_that_is_imported_is_declared():
    homes = metadata.packages_distributions()
    # Several distributions have parts of the package mlx.
    imported = {
        name: set(map(canonicalize_name, homes[name])) for name in imported_packages()
    }
    extras = metadata.metadata("mlx-optiq-ext").get_all("Provides-Extra")
    optional = [requirements(e).keys() for e in extras if e not in ("dev", "test")]
    declared = requirements().keys() | set().union(*optional)
    assert {name for name, found in imported.items() if not found & declared} == set()
    assert "mlx" in imported


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13"])
def test_the_extras_for_backends_are_those_of_mlx_lm(extra):
    requirements = metadata.requires("mlx-optiq-ext")
    assert f'mlx-lm[{extra}]; extra == "{extra}"' in requirements
    assert extra in metadata.metadata("mlx-lm").get_all("Provides-Extra")
