"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mlx_optiq_ext


def test_each_public_name_exists():
    for name in mlx_optiq_ext.__all__:
        assert getattr(mlx_optiq_ext, name) is not None


def test_the_public_names_are_sorted_and_listed():
    assert mlx_optiq_ext.__all__ == sorted(mlx_optiq_ext.__all__)
    assert set(mlx_optiq_ext.__all__) <= set(dir(mlx_optiq_ext))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'mlx_optiq_ext' has no attribute 'nope'"):
        mlx_optiq_ext.nope  # noqa: B018 - the access is what is tested


def test_a_public_name_is_not_found_before_it_is_asked_for():
    code = """
import sys, mlx_optiq_ext
print(*(name for name in ("click", "mlx", "mlx_lm", "numpy") if name in sys.modules))
print(mlx_optiq_ext.is_enabled())
print(*(name for name in ("click", "mlx", "mlx_lm", "numpy") if name in sys.modules))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["", "True", ""]
