"""A head that is stored by itself is served, by whichever flag it is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import server

from mlx_optiq_ext import SpeculationError, SpeculationStats
from mlx_optiq_ext.drafters import is_draft_model
from tests.helpers import DEMO

from .conftest import Starter
from .test_speculation import (
    CHAT,
    COMPLETIONS,
    ask,
    assert_counts_add_up,
    start_in_vain,
)


def head_tensors() -> dict[str, mx.array]:
    """Those of the demo model, with norms around one as MLX tools write them."""
    weights = mx.load(str(DEMO / "model.safetensors"))
    return {
        name.split("mtp.")[1]: w + 1 if w.ndim == 1 else w
        for name, w in weights.items()
        if "mtp." in name
    }


def split_head(folder: Path) -> Path:
    """A folder with the head as published by itself."""
    config = json.loads((DEMO / "config.json").read_text())
    text = config["text_config"]
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_5_mtp", "text_config": text})
    )
    save(folder / "model.safetensors", head_tensors())
    return folder


def optiq_folder(folder: Path) -> Path:
    """A folder beside the model's own with its configuration and a head."""
    folder.mkdir()
    shutil.copy(DEMO / "config.json", folder)
    save(
        folder / "mtp.safetensors",
        {f"mtp.{name}": w for name, w in head_tensors().items()},
    )
    return folder


def head_file(folder: Path) -> Path:
    return optiq_folder(folder) / "mtp.safetensors"


def save(file: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})


@pytest.fixture(scope="module")
def plain(start_server: Starter) -> Any:
    return start_server(folder=DEMO)


@pytest.mark.parametrize("make", [split_head, optiq_folder, head_file])
def test_a_head_is_told_from_a_language_model(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = make(tmp_path / "head")
    assert not is_draft_model(source)
    model, tokenizer = mlx_lm.load(str(DEMO))
    for name in ("draft", "mtp"):
        *_, last = mlx_lm.stream_generate(
            model,
            tokenizer,
            "class Queue:\n",
            max_tokens=16,
            num_draft_tokens=2,
            **{name: str(source)},
        )
        stats: SpeculationStats = last.speculation
        assert stats.num_accepted > 0
    assert is_draft_model(DEMO)


@pytest.mark.parametrize("make", [split_head, optiq_folder])
@pytest.mark.parametrize("flag", ["--draft", "--draft-model"])
def test_a_head_is_served_by_any_flag(
    flag: str,
    make: Callable[[Path], Path],
    plain: Any,
    start_server: Starter,
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "head")
    speculating = start_server(flag, str(source), folder=DEMO)
    for path in (COMPLETIONS, CHAT):
        reply = ask(speculating, path, num_draft_tokens=2)
        # The plain server may have more of the prompt in its cache.
        assert reply.text == ask(plain, path).text
        assert assert_counts_add_up(reply)[0] > 0
    speculating.stop()


@pytest.mark.parametrize("flag", ["--mtp", "--draft", "--draft-model"])
def test_a_drafter_that_cannot_be_read_ends_the_server(
    flag: str, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source in ("/nope", str(empty)):
        status, output = start_in_vain("--model", str(DEMO), flag, source)
        assert status == 1
        assert "Traceback" not in output
        assert source in output


def test_speculation_that_fails_is_not_left_out_by_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default model is loaded again after another one, and its head is gone."""
    source = split_head(tmp_path / "head")
    flags = ("--model", str(DEMO), "--mtp", str(source))
    monkeypatch.setattr("sys.argv", ["mlx_lm.server", *flags])
    providers: list[server.ModelProvider] = []

    def run(host: str, port: int, provider: server.ModelProvider) -> None:
        providers.append(provider)

    monkeypatch.setattr(server, "run", run)
    server.main()
    (provider,) = providers
    provider.load("default_model", None, "default_model")
    (source / "model.safetensors").unlink()
    provider.load(str(DEMO) + "/", None, None)
    for _ in range(3):
        with pytest.raises(SpeculationError, match="Cannot speculate"):
            provider.load("default_model", None, "default_model")
