"""Models remember where they were loaded from."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx_lm
import pytest

from mlx_optiq_ext._record import record_of
from tests.helpers import DEMO


def test_a_relative_path_is_remembered_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DEMO, tmp_path / "here" / "model")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model, tokenizer = mlx_lm.load("model")
    monkeypatch.chdir(tmp_path / "there")
    plain = mlx_lm.generate(model, tokenizer, "class Queue:\n", max_tokens=8)
    assert plain == mlx_lm.generate(
        model, tokenizer, "class Queue:\n", max_tokens=8, mtp=True
    )


def test_a_link_to_a_model_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache of the Hub consists of links, and its paths tell the repository.
    (tmp_path / "link").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    model, _ = mlx_lm.load("link")
    assert record_of(model).source == tmp_path / "link"
