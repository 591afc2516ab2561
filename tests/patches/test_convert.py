"""What mlx-lm's converting commands make of a head."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import wrapt
from mlx_lm import cli
from mlx_lm.utils import load_model

import mlx_optiq_ext
from mlx_optiq_ext.heads import Host, load_head, quantization_of
from tests.heads.variants import (
    DENSE,
    assert_equal,
    assert_same,
    checkpoint,
    in_full,
    oracle,
    parameters,
    write,
)
from tests.helpers import DEMO
from tests.processes import run_command

HEAD = "optiq/mtp.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(DENSE, tmp_path_factory.mktemp("original"), mx.bfloat16)


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    mlx_lm.convert(str(original), str(folder), quantize=True)
    return folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command of mlx-lm in this process, and return what it printed."""

    def run_here(command: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mlx_lm", command, *map(str, arguments)])
        capsys.readouterr()
        cli.main()
        return capsys.readouterr().out

    return run_here


def head_of(folder: Path) -> Any:
    host = Host.of(load_model(folder, lazy=True)[0])
    return load_head(folder, host.args, host.dtype)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def without_head(folder: Path, *names: str) -> dict[str, bytes]:
    """The files of a model whose head is gone, but for those named."""
    ours = {HEAD, "optiq/config.json", *names}
    return {name: x for name, x in contents(folder).items() if name not in ours}


def test_the_command_keeps_the_head_unless_told_to_drop_it(
    original: Path, tmp_path: Path
) -> None:
    arguments = ("--hf-path", original, "-q", "--mlx-path")
    code, output, _ = run_command("convert", *arguments, tmp_path / "with")
    assert code == 0
    _, output_too, _ = run_command(
        "convert", *arguments, tmp_path / "without", "--no-mtp"
    )
    line = f"[INFO] Kept the MTP head in {tmp_path / 'with' / HEAD}\n"
    assert output == output_too + line
    kept, dropped = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert kept.keys() - dropped.keys() == {HEAD, "optiq/config.json"}
    assert {n for n in dropped if kept[n] != dropped[n]} == {"config.json"}
    assert len(quantization_of(head_of(tmp_path / "with"))) == 7


def test_dropping_the_head_writes_what_mlx_lm_writes(
    original: Path, tmp_path: Path
) -> None:
    mlx_lm.convert(str(original), str(tmp_path / "dropped"), mtp=False)
    mlx_optiq_ext.disable()
    try:
        mlx_lm.convert(str(original), str(tmp_path / "upstream"))
    finally:
        mlx_optiq_ext.enable()
    assert contents(tmp_path / "dropped") == contents(tmp_path / "upstream")


def test_a_checkpoint_without_a_head_is_converted_as_by_mlx_lm(
    original: Path, tmp_path: Path
) -> None:
    config = json.loads((original / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    tensors = mx.load(str(original / "model.safetensors"))
    trunk = {name: x for name, x in tensors.items() if not name.startswith("mtp.")}
    headless = write(tmp_path / "headless", config, {"model.safetensors": trunk})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (headless / name).write_bytes((original / name).read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mlx_lm.convert(str(headless), str(tmp_path / "ours"), quantize=True)
    mlx_optiq_ext.disable()
    try:
        mlx_lm.convert(str(headless), str(tmp_path / "upstream"), quantize=True)
    finally:
        mlx_optiq_ext.enable()
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")


def test_a_model_of_another_family_is_converted_as_by_mlx_lm(tmp_path: Path) -> None:
    gemma = DEMO.parent / "demo_gemma"
    mlx_lm.convert(str(gemma), str(tmp_path / "ours"))
    mlx_optiq_ext.disable()
    try:
        mlx_lm.convert(str(gemma), str(tmp_path / "upstream"))
    finally:
        mlx_optiq_ext.enable()
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")


def test_a_head_that_is_declared_and_absent_is_warned_about(
    original: Path, tmp_path: Path
) -> None:
    headless, again = tmp_path / "headless", tmp_path / "again"
    mlx_lm.convert(str(original), str(headless), mtp=False)
    with pytest.warns(UserWarning, match=rf"none was found in {headless}.*--no-mtp"):
        mlx_lm.convert(str(headless), str(again))
    assert not (again / "optiq").exists()


def test_a_head_that_cannot_be_the_models_is_warned_about(
    original: Path, tmp_path: Path
) -> None:
    config, trunk, head = oracle(DENSE)
    head["fc.weight"] = mx.zeros((64, 64))
    tensors = trunk | {f"mtp.{name}": x for name, x in head.items()}
    damaged = write(tmp_path / "damaged", config, {"model.safetensors": tensors})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).write_bytes((original / name).read_bytes())
    with pytest.warns(UserWarning, match=r"\[64, 64\] in place of \[64, 128\]"):
        mlx_lm.convert(str(damaged), str(tmp_path / "model"))
    assert load_model(tmp_path / "model")
    assert not (tmp_path / "model" / "optiq").exists()


@pytest.mark.parametrize("mtp", [None, "yes", 1])
def test_anything_but_true_and_false_is_an_error(mtp: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"mtp must be True or False, got {mtp!r}"):
        mlx_lm.convert(str(DEMO), str(tmp_path / "model"), mtp=mtp)


def test_a_folder_that_exists_is_mlx_lms_error(quantized: Path) -> None:
    before = contents(quantized)
    with pytest.raises(ValueError, match="already exists"):
        mlx_lm.convert(str(DEMO), str(quantized))
    assert contents(quantized) == before


def test_the_type_asked_for_is_that_of_the_head_too(
    original: Path, tmp_path: Path
) -> None:
    mlx_lm.convert(str(original), str(tmp_path / "model"), dtype="float16")
    tensors = mx.load(str(tmp_path / "model" / HEAD))
    assert {x.dtype for x in tensors.values()} == {mx.float16}


def test_a_recipe_for_mixed_bits_gives_the_head_the_bits_of_most_layers(
    original: Path, tmp_path: Path
) -> None:
    mlx_lm.convert(
        str(original),
        str(tmp_path / "model"),
        quantize=True,
        q_group_size=64,
        quant_predicate="mixed_3_6",
    )
    found = quantization_of(head_of(tmp_path / "model"))
    assert len(found) == 7
    assert {x["bits"] for x in found.values()} == {3}


def test_a_converted_model_is_converted_again_with_its_head(
    quantized: Path, tmp_path: Path
) -> None:
    mlx_lm.convert(str(quantized), str(tmp_path / "same"))
    assert_same(head_of(tmp_path / "same"), head_of(quantized))


def test_a_model_put_in_full_gets_its_head_in_full(
    quantized: Path, tmp_path: Path
) -> None:
    mlx_lm.convert(str(quantized), str(tmp_path / "full"), dequantize=True)
    found = head_of(tmp_path / "full")
    assert quantization_of(found) == {}
    assert_equal(parameters(found), in_full(head_of(quantized)))
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert "mtplx_mtp_quantization" not in config


def test_the_head_is_there_when_the_model_is_uploaded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    module = importlib.import_module("mlx_lm.convert")
    monkeypatch.setattr(
        module, "upload_to_hub", lambda path, repo: seen.append((Path(path), repo))
    )
    folder = tmp_path / "model"
    mlx_lm.convert(str(original), str(folder), upload_repo="me/model")
    assert seen == [(folder, "me/model")]
    assert (folder / HEAD).is_file()


def adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter as mlx_lm.lora writes it, which changes the last layers a bit."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    loaded, _ = load_model(model)
    loaded.freeze()
    linear_to_lora_layers(loaded, 2, parameters)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(x.shape, x.dtype, scale=0.02)
        for name, x in tree_flatten(loaded.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def demo_4bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    mlx_lm.convert(str(DEMO), str(folder), quantize=True)
    return folder


def test_an_adapted_model_finds_the_head_and_a_fused_one_has_it(
    demo_4bit: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    lora = adapter(demo_4bit, tmp_path / "lora")
    model, tokenizer = mlx_lm.load(str(demo_4bit), adapter_path=str(lora))
    plain = mlx_lm.generate(model, tokenizer, "class Queue:\n", max_tokens=24)
    *_, last = mlx_lm.stream_generate(
        model, tokenizer, "class Queue:\n", max_tokens=24, mtp=True, num_draft_tokens=1
    )
    assert last.speculation.num_accepted > 2
    assert plain == mlx_lm.generate(
        model, tokenizer, "class Queue:\n", max_tokens=24, mtp=True, num_draft_tokens=1
    )

    arguments = ("--model", demo_4bit, "--adapter-path", lora, "--save-path")
    assert "Kept the MTP head" in call("fuse", *arguments, tmp_path / "fused")
    assert_same(head_of(tmp_path / "fused"), head_of(demo_4bit))

    call("fuse", *arguments, tmp_path / "full", "--dequantize")
    assert quantization_of(head_of(tmp_path / "full")) == {}


def test_commands_that_learn_a_quantisation_keep_the_head(
    tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # Where mlx-lm keeps the text that it learns from, once it is downloaded.
    text = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"
    text.parent.mkdir(parents=True)
    text.write_text("def fib(n):\n    return n\n\n" * 60)
    sensitivities = tmp_path / "sensitivities.json"
    names = [
        path
        for path, module in load_model(DEMO)[0].named_modules()
        if hasattr(module, "to_quantized")
    ]
    sensitivities.write_text(json.dumps([[name, i] for i, name in enumerate(names)]))
    folder = tmp_path / "model"
    output = call(
        "dynamic_quant",
        *("--model", DEMO, "--mlx-path", folder, "--target-bpw", 5.5),
        *("--sensitivities", sensitivities),
    )
    assert "Kept the MTP head" in output
    assert quantization_of(head_of(folder))
    # These take long or need a data set, and save the same way.
    save = importlib.import_module("mlx_lm.utils").save
    assert isinstance(save, wrapt.FunctionWrapper)
    for command in ("dwq", "awq", "gptq"):
        assert importlib.import_module(f"mlx_lm.quant.{command}").save is save


@pytest.mark.parametrize("name", ["mlx_lm_extra_tensors", "mtplx_mtp_quantization"])
@pytest.mark.parametrize("value", ["x", 5, [1, 2], {"mtp_file": 1, "bits": "x"}])
def test_a_block_of_a_wrong_type_ends_no_conversion(
    original: Path, tmp_path: Path, name: str, value: Any
) -> None:
    odd = shutil.copytree(original, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {name: value}))
    mlx_lm.convert(str(odd), str(tmp_path / "model"), quantize=True)
    assert load_model(tmp_path / "model")
    assert len(quantization_of(head_of(tmp_path / "model"))) == 7


def test_a_head_with_a_quantisation_that_is_none_is_left_behind(
    original: Path, tmp_path: Path
) -> None:
    odd = shutil.copytree(original, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    block = {"prequantized": False, "bits": "four"}
    config["mtplx_mtp_quantization"] = block
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"written without its MTP head.*'four'"):
        mlx_lm.convert(str(odd), str(tmp_path / "model"))
    assert load_model(tmp_path / "model")


FULL_DISK = """
import resource, signal, sys
import mlx_lm, mlx_lm.utils
from mlx_lm import cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv.pop())
upstream = mlx_lm.utils.create_model_card

def last_file_of_upstream(*args, **kwargs):
    upstream(*args, **kwargs)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

mlx_lm.utils.create_model_card = last_file_of_upstream
cli.main()
"""


@pytest.mark.parametrize(
    ("size", "name"), [(10, "config.json"), (10_000, "mtp.safetensors")]
)
def test_a_disk_that_is_full_before_the_head_costs_the_head_only(
    original: Path, tmp_path: Path, size: int, name: str
) -> None:
    folder = tmp_path / "model"
    arguments = ["convert", "--hf-path", original, "--mlx-path", folder, size]
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in process.stderr
    assert process.returncode == 0
    assert "The model is written without its MTP head" in process.stderr
    assert str(folder / "optiq" / name) in process.stderr or (
        str(folder / name) in process.stderr
    )
    assert load_model(folder)
    assert not (folder / "optiq").exists()
    assert not list(folder.glob(".*"))


def test_the_command_that_is_suggested_can_be_pasted(
    original: Path, tmp_path: Path
) -> None:
    headless, again = tmp_path / "headless", tmp_path / "my model"
    mlx_lm.convert(str(original), str(headless), mtp=False)
    with pytest.warns(UserWarning, match=f"ORIGINAL --into '{again}' adds"):
        mlx_lm.convert(str(headless), str(again))
