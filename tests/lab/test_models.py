"""Models are found in folders and in the cache of the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_optiq_ext.lab._models import find_models
from tests.helpers import DEMO


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def add_to_cache(cache: Path, name: str) -> None:
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(DEMO, repo / "snapshots" / "abc")


def test_the_demo_models_are_always_there(cache):
    found = find_models()
    assert list(found) == ["demo/qwen", "demo/gemma", "demo/gemma-assistant"]
    assert [model.kind for model in found.values()] == ["model", "model", "assistant"]


def test_weights_are_counted_once(cache):
    found = find_models()
    size = (DEMO / "model.safetensors").stat().st_size
    assert found["demo/qwen"].num_bytes == size
    gemma = DEMO.parent / "demo_gemma" / "model.safetensors"
    assert found["demo/gemma"].num_bytes == gemma.stat().st_size


def test_models_of_the_cache_are_named_by_their_id(cache):
    add_to_cache(cache, "Org/Model-1")
    model = find_models()["Org/Model-1"]
    assert model.source == "Org/Model-1"
    assert model.folder == cache / "models--Org--Model-1" / "snapshots" / "abc"


def test_a_download_that_is_not_complete_is_no_model(cache):
    add_to_cache(cache, "Org/Half")
    (snapshot,) = cache.glob("models--Org--Half/snapshots/*")
    (snapshot / "model.safetensors").unlink()
    assert "Org/Half" not in find_models()


def test_folders_are_searched_two_levels_deep(cache, tmp_path):
    for name in ("a", "b/c", "d/e/f"):
        shutil.copytree(DEMO, tmp_path / "mine" / name)
    found = find_models([tmp_path / "mine"])
    mine = [name for name in found if not name.startswith("demo/")]
    assert mine == [str(tmp_path / "mine" / name) for name in ("a", "b/c")]


def test_a_folder_may_be_a_model_itself(cache, tmp_path):
    shutil.copytree(DEMO, tmp_path / "own")
    assert str(tmp_path / "own") in find_models([tmp_path / "own"])


def test_a_model_says_what_sampling_it_recommends(cache, tmp_path):
    shutil.copytree(DEMO, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.5, "top_k": None, "do_sample": False}))
    model = find_models([tmp_path])[str(tmp_path / "own")]
    assert model.sampling == {"temperature": 0.5}
    assert model.is_greedy


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"model_type": 3}'])
def test_a_folder_with_another_configuration_is_no_model(cache, tmp_path, content):
    shutil.copytree(DEMO, tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text(content)
    assert str(tmp_path / "own") not in find_models([tmp_path])


def test_what_cannot_be_read_is_passed_over(cache, tmp_path):
    shutil.copytree(DEMO, tmp_path / "own")
    (tmp_path / "own" / "model-2.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    add_to_cache(cache, "Org/Model")
    (cache / "models--Org--Model" / "refs" / "main").write_bytes(b"\xff/../..\0")
    found = find_models([tmp_path])
    size = (DEMO / "model.safetensors").stat().st_size
    assert found[str(tmp_path / "own")].num_bytes == size
    assert "Org/Model" not in found


def test_only_numbers_are_recommended(cache, tmp_path):
    shutil.copytree(DEMO, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text('{"temperature": NaN, "top_p": true, "top_k": 1e999, "min_p": 0.5}')
    assert find_models([tmp_path])[str(tmp_path / "own")].sampling == {"min_p": 0.5}


def test_a_configuration_that_is_nested_without_end_is_no_model(cache, tmp_path):
    shutil.copytree(DEMO, tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text("[" * 200_000)
    assert str(tmp_path / "own") not in find_models([tmp_path])
