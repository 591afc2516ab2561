"""Puts the start-up files at the top of site-packages, as a step of the build."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py as _build_py

HERE = Path(__file__).parent
START_UP_FILES = ("mlx_optiq_ext.pth", "mlx_optiq_ext.start")


class build_py(_build_py):
    def run(self) -> None:
        super().run()
        # A wheel is assembled in build_lib, an editable one in install_lib.
        if self.editable_mode:
            target = self.get_finalized_command("install").install_lib
        else:
            target = self.build_lib
        for name in START_UP_FILES:
            self.copy_file(str(HERE / name), target)

    def get_source_files(self) -> list[str]:
        """Add what a source distribution needs in order to build."""
        names = (Path(__file__).name, *START_UP_FILES)
        return [*super().get_source_files(), *(f"scripts/{name}" for name in names)]
