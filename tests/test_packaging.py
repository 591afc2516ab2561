"""Both kinds of installation, their removal, and the metadata."""

from __future__ import annotations

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


def test_the_metadata_and_the_patch_table_support_the_same_mlx_lm():
    requirements = map(Requirement, metadata.requires("mlx-optiq-ext"))
    (required,) = (
        requirement.specifier
        for requirement in requirements
        if requirement.name == "mlx-lm" and requirement.marker is None
    )
    assert required == SpecifierSet(SUPPORTED)


def test_the_versions_that_are_tested_are_supported():
    versions = run_path(str(ROOT / "scripts" / "test_versions.py"))["VERSIONS"]
    assert versions
    assert all(SpecifierSet(SUPPORTED).contains(version) for version in versions)


def test_what_is_needed_at_run_time_is_four_packages():
    requirements = map(Requirement, metadata.requires("mlx-optiq-ext"))
    needed = {
        requirement.name for requirement in requirements if requirement.marker is None
    }
    assert needed == {"click", "mlx", "mlx-lm", "wrapt"}


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13"])
def test_the_extras_for_backends_are_those_of_mlx_lm(extra):
    requirements = metadata.requires("mlx-optiq-ext")
    assert f'mlx-lm[{extra}]; extra == "{extra}"' in requirements
    assert extra in metadata.metadata("mlx-lm").get_all("Provides-Extra")
