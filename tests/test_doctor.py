"""`mlx-optiq-ext doctor`: the command, and what it concludes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

import mlx_optiq_ext
from mlx_optiq_ext import _comparing
from mlx_optiq_ext.cli import _diagnosis, main
from mlx_optiq_ext.cli.doctor import render
from tests.helpers import DEMO

GEMMA = DEMO.parent / "demo_gemma"


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_diagnosis, "MAX_TOKENS", 16)
    prompts = {"code": "class Queue:\n", "prose": "# The file is"}
    monkeypatch.setattr(_comparing, "PROMPTS", prompts)


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost") / "model"
    mlx_lm.convert(str(DEMO), str(folder), quantize=True, mtp=False)
    return folder


def doctor(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["doctor", "--json", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, json.loads(result.stdout)


def test_a_model_with_its_head_works():
    code, report = doctor(DEMO)
    assert code == 0
    assert report["works"] is True
    assert report["problem"] is report["to_do"] is None
    assert report["model"]["type"] == "qwen3_5"
    assert report["model"]["quantization"] == {}
    drafter = report["drafter"]
    assert drafter["kind"] == "MTP head"
    assert drafter["files"] == [str(DEMO / "model.safetensors")]
    assert drafter["layout"] == "15 mtp.* tensors, dense"
    assert drafter["norms"] == "zero-centred"
    assert drafter["norms_told_by"].startswith("the trunk stored with it is that of")
    memory = report["memory"]
    assert memory["drafter_bytes"] == drafter["num_bytes"] == 4 * 246528
    assert memory["drafter_bytes_per_token"] == 2 * 64 * 4
    test = report["test"]
    assert list(test["prompts"]) == ["code", "prose"]
    assert all(x["difference"] is None for x in test["prompts"].values())
    assert test["acceptance_rate"] > 0.5
    assert test["mean_accepted_length"] == pytest.approx(1 + test["acceptance_rate"])
    assert report["pays"] == (test["speed_up"] >= 1.05)
    assert report["verdict"].endswith(
        f"{test['speed_up']:.2f}x, measured on built-in prompts"
    )


def test_a_model_can_be_examined_without_decoding(lost):
    code, report = doctor("--no-test", DEMO)
    assert code == 0
    assert report["drafter"]["kind"] == "MTP head"
    assert report["test"] is report["pays"] is None
    assert report["works"] is True
    assert "was not tried" in report["verdict"]
    code, report = doctor("--no-test", lost)
    assert code == 1
    assert "there is no MTP head" in report["problem"]
    assert "extract-mtp" in report["to_do"]


def test_the_report_reads_in_a_few_lines_and_ends_with_a_verdict():
    result = CliRunner().invoke(main, ["doctor", str(DEMO)])
    assert result.exit_code == 0
    assert result.stderr.startswith("Testing")
    labels = [line[:15].strip() for line in result.stdout.splitlines()]
    assert [label for label in labels if label] == [
        "model",
        "drafter",
        "layout",
        "norms",
        "kept in",
        "memory",
        "exactness",
        "acceptance",
        "speed-up",
        "verdict",
    ]
    assert result.stdout.splitlines()[-1].startswith("verdict         speculation work")


def test_a_model_that_has_lost_its_head_is_told_how_to_get_it_back(lost):
    code, report = doctor(lost)
    assert code == 1
    assert report["works"] is False
    assert report["drafter"] is report["test"] is None
    assert "there is no MTP head" in report["problem"]
    command = f"mlx-optiq-ext extract-mtp ORIGINAL --into {lost}"
    assert report["to_do"].endswith(command)
    lines = render(report).splitlines()
    assert lines[-1] == "verdict         speculation will not work"


def test_the_original_is_named_if_the_model_card_names_it(lost, tmp_path):
    folder = shutil.copytree(lost, tmp_path / "model")
    (folder / "README.md").write_text("---\nbase_model: Qwen/Qwen3.5-4B\n---\n")
    _, report = doctor(folder)
    assert f"extract-mtp Qwen/Qwen3.5-4B --into {folder}" in report["to_do"]
    # A model in the Hub's cache is not changed.
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    assert _diagnosis._how_to_get(mlx_lm.load(str(folder))[0], snapshot).endswith(
        "--mtp Qwen/Qwen3.5-4B"
    )


def test_what_the_doctor_says_to_do_helps(lost, tmp_path):
    folder = shutil.copytree(lost, tmp_path / "model")
    _, report = doctor(folder)
    *_, command = report["to_do"].partition("mlx-optiq-ext ")
    arguments = command.replace("ORIGINAL", str(DEMO)).split()
    assert CliRunner().invoke(main, arguments).exit_code == 0
    code, report = doctor(folder)
    assert code == 0
    assert report["drafter"]["quantization"] == {"4-bit affine, group size 64": 7}
    assert report["drafter"]["norms"] == "absolute"


def test_commands_that_are_suggested_can_be_pasted(lost, tmp_path):
    folder = shutil.copytree(lost, tmp_path / "it's my model")
    _, report = doctor(folder)
    *_, command = report["to_do"].partition("mlx-optiq-ext ")
    assert shlex.split(command)[-1] == str(folder)


def damaged(model: Path, size: int) -> None:
    file = model / "optiq" / "mtp.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def wrong(model: Path, _: int) -> None:
    file = str(model / "optiq" / "mtp.safetensors")
    tensors = mx.load(file)
    mx.eval(list(tensors.values()))
    tensors["mtp.norm.weight"] = mx.ones((3,))
    mx.save_safetensors(file, tensors, {"format": "mlx"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(damaged, "not a complete safetensors file"), (wrong, "[3] in place of [128]")],
)
def test_no_conversion_is_blamed_for_a_head_that_is_there(tmp_path, spoil, reason):
    folder = tmp_path / "model"
    mlx_lm.convert(str(DEMO), str(folder), quantize=True)
    spoil(folder, 1000)
    code, report = doctor(folder)
    assert code == 1
    assert reason in report["problem"]
    assert report["to_do"].startswith("To put another head in its place: ")
    *_, command = report["to_do"].partition("mlx-optiq-ext ")
    arguments = shlex.split(command.replace("ORIGINAL", str(DEMO)))
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert doctor(folder)[0] == 0


def test_no_conversion_is_blamed_for_a_head_from_elsewhere(lost, tmp_path):
    for name, content in (("broken", b"head"), ("empty", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if content is not None:
            (folder / "mtp.safetensors").write_bytes(content)
        code, report = doctor(lost, "--mtp", folder)
        assert code == 1
        assert str(folder) in report["problem"]
        assert report["to_do"] is None


def test_a_head_from_elsewhere_is_examined(lost):
    code, report = doctor(lost, "--mtp", DEMO)
    assert code == 0
    assert report["drafter"]["source"] == str(DEMO)


def test_a_head_of_another_model_is_not_good_enough(lost, tmp_path):
    tensors = mx.load(str(DEMO / "model.safetensors"))
    mx.random.seed(0)
    head = {
        name: mx.random.normal(x.shape) if x.ndim > 1 else x
        for name, x in tensors.items()
        if name.startswith("mtp.")
    }
    mx.save_safetensors(str(tmp_path / "head.safetensors"), head)
    code, report = doctor(lost, "--mtp", tmp_path / "head.safetensors")
    assert code == 1
    assert report["works"] is False
    assert report["test"]["acceptance_rate"] < _diagnosis.MIN_ACCEPTANCE_RATE
    assert all(x["difference"] is None for x in report["test"]["prompts"].values())
    assert "is that of another model or damaged" in report["verdict"]


def test_a_gemma_needs_its_assistant():
    code, report = doctor(GEMMA)
    assert code == 1
    assert "--draft PATH" in report["to_do"]
    code, report = doctor(GEMMA, "--draft", GEMMA / "assistant")
    assert code == 0
    assert report["drafter"]["kind"] == "assistant"
    assert report["drafter"]["num_parameters"] > 400_000
    code, report = doctor(DEMO, "--draft", GEMMA / "assistant")
    assert code == 1
    assert "only gemma4, gemma4_unified and gemma4_text" in report["problem"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [("nowhere", "no folder here"), (Path(__file__).parent, "config.json")],
)
def test_what_is_no_model_is_a_problem(model, reason):
    code, report = doctor(model)
    assert code == 1
    assert report["model"] is None
    assert reason in report["problem"]


def test_a_model_that_does_not_fit_into_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 1_000_000})
    code, report = doctor(DEMO)
    assert code == 1
    assert report["test"] is None
    assert "0.0 GB" in report["problem"]
    assert report["memory"]["device_bytes"] == 1_000_000


def test_two_drafters_are_a_usage_error():
    result = CliRunner().invoke(main, ["doctor", "x", "--mtp", "a", "--draft", "b"])
    assert result.exit_code == 2
    assert "--mtp and --draft exclude each other" in result.output


def test_where_the_extension_is_switched_off_that_is_the_problem(monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT", "0")
    code, report = doctor(DEMO)
    assert code == 1
    assert "MLX_OPTIQ_EXT=0 is set" in report["problem"]
    assert not mlx_optiq_ext.is_enabled()


def found_by_trying(**changes: Any) -> dict[str, Any]:
    """What a test may have found, with changes."""
    difference = changes.pop("difference", None)
    test = {"acceptance_rate": 0.7, "speed_up": 1.3} | changes
    prompts = {"code": {"difference": None}, "prose": {"difference": difference}}
    return {"problem": None, "test": {**test, "prompts": prompts}}


@pytest.mark.parametrize(
    ("found", "works", "pays", "verdict"),
    [
        (found_by_trying(), True, True, "works and pays here: 1.30x"),
        (
            found_by_trying(speed_up=0.8),
            True,
            False,
            "works but does not pay here: 0.80x",
        ),
        (
            found_by_trying(speed_up=1.02),
            True,
            False,
            "works but does not pay here: 1.02x",
        ),
        (
            found_by_trying(acceptance_rate=0.05),
            False,
            False,
            "5.0% of draft tokens are",
        ),
        (
            found_by_trying(difference={"position": 9, "margin": 0.02}),
            True,
            True,
            "works and pays here",
        ),
        (
            found_by_trying(difference={"position": 9, "margin": 2.5}),
            False,
            False,
            "plain decoding prefers by 2.50",
        ),
    ],
)
def test_the_verdict_follows_from_the_test(found, works, pays, verdict):
    judged = _diagnosis._judge(found)
    assert (judged["works"], judged["pays"]) == (works, pays)
    assert verdict in judged["verdict"]
