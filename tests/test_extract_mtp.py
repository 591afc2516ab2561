"""`mlx-optiq-ext extract-mtp`: the command, on models that have lost their head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load_model

from mlx_optiq_ext.cli import main
from mlx_optiq_ext.cli.extract_mtp import MODES
from mlx_optiq_ext.heads import Host, _host, load_head, quantization_of
from tests.heads.test_hub import COMMIT, INDEX, Hub, hub, hub_cache
from tests.heads.variants import DENSE, MOE, assert_same, checkpoint, write
from tests.helpers import DEMO

__all__ = ["hub", "hub_cache"]  # Fixtures.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original and two conversions, with the head and without."""
    place = tmp_path_factory.mktemp("place")
    original = checkpoint(DENSE, place / "original", mx.bfloat16)
    mlx_lm.convert(str(original), str(place / "kept"), quantize=True)
    mlx_lm.convert(str(original), str(place / "lost"), quantize=True, mtp=False)
    return place


@pytest.fixture
def lost(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "lost", tmp_path / "lost")


def extract(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["extract-mtp", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def head_of(folder: Path) -> Any:
    host = Host.of(load_model(folder, lazy=True)[0])
    return load_head(folder, host.args, host.dtype)


def test_the_head_is_the_one_that_the_conversion_would_have_kept(place, lost):
    code, output = extract(place / "original", "--into", lost)
    assert code == 0
    assert contents(lost) == contents(place / "kept")
    assert f"Added the MTP head of {place / 'original'}" in output
    assert f"mlx-optiq-ext doctor {lost}" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--q-bits", 8], {"group_size": 64, "bits": 8, "mode": "affine"}),
        (
            ["--q-bits", 6, "--q-group-size", 32],
            {"group_size": 32, "bits": 6, "mode": "affine"},
        ),
        (["--q-mode", "mxfp8"], {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
    ],
)
def test_the_head_can_be_quantised_otherwise(place, lost, options, expected):
    # Also if it is quantised already.
    for source in ("original", "kept"):
        code, output = extract(place / source, "--into", lost, *options)
        assert code == 0, output
        found = quantization_of(head_of(lost))
        assert len(found) == 7
        assert all(params == expected for params in found.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--q-bits", 7], "bits"),
        (["--q-mode", "mxfp4", "--q-bits", 8], "mxfp4"),
        (["--q-group-size", 256], "Groups of 256 do not fit"),
        (["--q-group-size", 48], "Groups of 48 do not fit"),
        (["--q-mode", "int4"], "affine"),
        (["--q-bits", 0], "x>=1"),
    ],
)
def test_a_quantisation_that_cannot_be_is_an_error(place, lost, options, reason):
    before = contents(lost)
    code, output = extract(place / "original", "--into", lost, *options)
    assert code != 0
    assert "Error: " in output
    assert reason in output
    assert contents(lost) == before


def test_all_modes_are_offered():
    assert tuple(_host.MODES) == MODES


def test_a_head_that_does_not_fit_is_refused(place, lost, tmp_path):
    before = contents(lost)
    other = checkpoint(MOE, tmp_path / "other")
    for source, reason in (
        (other, "a mixture of experts and the model is dense"),
        (DEMO, r"in place of"),
        (place / "lost", "there is no MTP head"),
        ("nowhere", "neither a folder"),
    ):
        code, output = extract(source, "--into", lost)
        assert code == 1
        assert output.startswith("Error: Cannot speculate")
        assert reason in output
    assert contents(lost) == before


def test_a_model_that_cannot_have_a_head_is_refused(place, tmp_path):
    gemma = shutil.copytree(DEMO.parent / "demo_gemma", tmp_path / "gemma")
    before = contents(gemma)
    code, output = extract(place / "original", "--into", gemma)
    assert (code, contents(gemma)) == (1, before)
    assert "the model is of type gemma4" in output


@pytest.mark.parametrize("target", ["nowhere", "Qwen/Qwen3.5-9B"])
def test_a_model_that_is_not_in_a_folder_is_refused(place, target):
    code, output = extract(place / "original", "--into", target)
    assert code == 1
    assert f"Error: {target} is no folder with a config.json" in output


def test_a_model_in_the_hubs_cache_is_refused(place, tmp_path):
    snapshot = tmp_path / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(place / "lost", snapshot)
    before = contents(snapshot)
    code, output = extract(place / "original", "--into", snapshot)
    assert (code, contents(snapshot)) == (1, before)
    assert "is in the Hub's cache, which is not changed" in output


def test_weights_that_cannot_be_read_are_an_error(place, lost):
    (lost / "model.safetensors").unlink()
    code, output = extract(place / "original", "--into", lost)
    assert code == 1
    assert "No safetensors found" in output


@pytest.mark.usefixtures("hub_cache")
def test_of_a_repository_only_the_shards_with_the_head_are_fetched(
    hub: Hub, place, lost
):
    tensors = mx.load(str(place / "original" / "model.safetensors"))
    head = {name: x for name, x in tensors.items() if name.startswith("mtp.")}
    trunk = {name: x for name, x in tensors.items() if name not in head}
    config = json.loads((place / "original" / "config.json").read_text())
    shards = {
        "model-00001-of-00002.safetensors": trunk,
        "model-00002-of-00002.safetensors": head,
    }
    write(hub.folder, config, shards, with_index=True)
    code, output = extract("org/head", "--into", lost)
    assert code == 0, output
    assert hub.downloads() == {"config.json", INDEX, "model-00002-of-00002.safetensors"}
    assert_same(head_of(lost), head_of(place / "kept"))


def test_a_head_that_is_damaged_or_anothers_is_refused(place, lost, tmp_path):
    before = contents(lost)
    damaged = shutil.copytree(place / "original", tmp_path / "damaged")
    file = damaged / "model.safetensors"
    tensors = mx.load(str(file))
    mx.eval(list(tensors.values()))
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"] * mx.nan
    mx.save_safetensors(str(file), tensors)
    other = shutil.copytree(place / "original", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] = 512
    (other / "config.json").write_text(json.dumps(config))
    for source, reason in (
        (damaged, "not finite numbers: fc.weight"),
        (other, "vocab_size of 512"),
    ):
        code, output = extract(source, "--into", lost)
        assert code == 1
        assert output.startswith("Error: Cannot speculate")
        assert reason in output
    assert contents(lost) == before


def test_commands_that_are_suggested_can_be_pasted(place, tmp_path):
    folder = shutil.copytree(place / "lost", tmp_path / "my model")
    code, output = extract(place / "original", "--into", folder)
    assert code == 0
    assert f"mlx-optiq-ext doctor '{folder}'" in output
    _, output = extract("my head", "--into", "nowhere")
    assert "--mtp 'my head'" in output
