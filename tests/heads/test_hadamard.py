"""Heads of models whose weights are rotated, such as Ternary-Bonsai-2-27B."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5 import TextModelArgs
from mlx_lm.utils import load_model, save_model

from mlx_optiq_ext import SpeculationError, _comparing
from mlx_optiq_ext.cli import _diagnosis, main
from mlx_optiq_ext.heads import Host, MTPHead, load_head, quantization_of
from tests.heads.variants import assert_same, prefixed, write
from tests.helpers import DEMO, assert_same_tokens

# mlx-lm 0.32.0 and 0.32.1 do not have such models.
hadamard = pytest.importorskip("mlx_lm.models.prism_hadamard_qwen35")

BLOCK = 512
TEXT_CONFIG = {
    "model_type": "qwen3_5_text",
    "hidden_size": BLOCK,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
    },
}
PROMPT = [5, 9, 200, 41, 7, 77, 1500, 3]


def rotated(path: str, block: int = BLOCK) -> dict[str, Any]:
    is_embedding = path == "model.embed_tokens"
    return {
        "path": path,
        "embedding": is_embedding,
        "dtype": "float16",
        "block": block,
    }


MODULES = [
    rotated("model.embed_tokens"),
    rotated("lm_head"),
    *(
        rotated(f"model.layers.{i}.mlp.{name}_proj")
        for i in range(2)
        for name in ("gate", "up")
    ),
    *(rotated(f"model.layers.1.self_attn.{name}_proj") for name in "qkv"),
    rotated("model.layers.1.self_attn.o_proj", 0),
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of that class, without a head."""
    config = {
        "model_type": "prism_hadamard_qwen35",
        "text_config": TEXT_CONFIG,
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": MODULES,
    }
    mx.random.seed(0)
    model = hadamard.Model(hadamard.ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    for module in model.modules():
        if isinstance(module, hadamard.HadamardQuantizedLinear):
            _fill(module)
    folder = tmp_path_factory.mktemp("hadamard") / "trunk"
    save_model(folder, model, donate_model=False)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def _fill(module: Any) -> None:
    num_outputs, num_inputs = module.weight.shape[0], module.weight.shape[1] * 16
    weight = mx.random.normal((num_outputs, num_inputs)) / math.sqrt(num_inputs)
    packed = mx.quantize(weight.astype(mx.float16), group_size=128, bits=2)
    module.weight, module.scales, module.biases = packed
    if module.block:
        module.signs = mx.where(mx.random.uniform(shape=(num_inputs,)) < 0.5, -1.0, 1.0)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head as the original model has it: in full, in a folder of its own."""
    mx.random.seed(1)
    module = MTPHead(TextModelArgs.from_dict(TEXT_CONFIG))
    module.set_dtype(mx.bfloat16)
    tensors = prefixed(dict(tree_flatten(module.parameters())))
    config = {"model_type": "qwen3_5", "text_config": TEXT_CONFIG}
    folder = tmp_path_factory.mktemp("hadamard") / "head"
    return write(folder, config, {"model.safetensors": tensors}, {"format": "mlx"})


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def decode(folder: Path, **options: Any) -> list[Any]:
    model, tokenizer = mlx_lm.load(str(folder))
    return [
        (response.token, response.logprobs)
        for response in mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=10, **options
        )
    ]


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_text_and_logprobs_with_a_head_are_plain_decodings(
    trunk: Path, head: Path, num_draft_tokens: int
) -> None:
    speculative = decode(trunk, mtp=str(head), num_draft_tokens=num_draft_tokens)
    assert_same_tokens(decode(trunk), speculative)


def test_the_head_reads_embeddings_that_are_rotated_back(
    trunk: Path, head: Path
) -> None:
    model, _ = load_model(trunk)
    with pytest.raises(SpeculationError, match="there is no MTP head"):
        list(mlx_lm.stream_generate(model, mlx_lm.load(str(DEMO))[1], PROMPT, mtp=True))
    tokens = mx.array(PROMPT)
    list(
        mlx_lm.stream_generate(
            model, mlx_lm.load(str(DEMO))[1], PROMPT, mtp=str(head), max_tokens=1
        )
    )
    table = model.model.embed_tokens
    packed = (table.weight[tokens], table.scales[tokens], table.biases[tokens])
    rows = mx.dequantize(*packed, group_size=128, bits=2)
    expected = hadamard.hadamard_rotate(rows, BLOCK, table.signs, inverse=True)
    assert mx.allclose(model.embed(tokens), expected, atol=1e-3)
    assert not mx.allclose(model.embed(tokens), rows, atol=1e-2)


def test_the_host_has_the_precision_of_its_states_and_no_rotated_quantisation(
    trunk: Path,
) -> None:
    host = Host.of(load_model(trunk)[0])
    assert host.dtype == mx.float16
    # What 2 bits lose is made good by the rotation, which a head does not have.
    assert host.quantization == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_rotated_layers_are_told_from_those_that_are_only_quantised(
    trunk: Path,
) -> None:
    model, _ = load_model(trunk)
    modes = [params["mode"] for params in quantization_of(model).values()]
    assert len(modes) == len(MODULES)
    assert set(modes) == {"HadamardQuantizedEmbedding", "HadamardQuantizedLinear"}


def test_an_extracted_head_is_found_and_outlives_a_conversion(
    trunk: Path, head: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trunk, tmp_path / "model")
    code, output = command("extract-mtp", head, "--into", folder)
    assert code == 0, output
    assert_same_tokens(decode(trunk), decode(folder, mtp=True, num_draft_tokens=2))
    mlx_lm.convert(str(folder), str(tmp_path / "converted"))
    assert_same(_head_of(tmp_path / "converted"), _head_of(folder))
    assert decode(tmp_path / "converted", mtp=True)


def _head_of(folder: Path) -> nn.Module:
    host = Host.of(load_model(folder, lazy=True)[0])
    return load_head(folder, host.args, host.dtype)


def test_the_doctor_examines_such_a_model_and_its_head(
    trunk: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_diagnosis, "MAX_TOKENS", 8)
    monkeypatch.setattr(_comparing, "PROMPTS", {"code": "class Queue:\n"})
    code, output = command("doctor", trunk, "--mtp", head, "--json")
    report = json.loads(output[output.index("{") :])
    assert report["problem"] is None
    assert report["model"]["type"] == "prism_hadamard_qwen35"
    kinds = report["model"]["quantization"]
    assert kinds == {
        "2-bit HadamardQuantizedLinear, group size 128": len(MODULES) - 1,
        "2-bit HadamardQuantizedEmbedding, group size 128": 1,
    }
    assert report["drafter"]["kind"] == "MTP head"
    prompts = report["test"]["prompts"].values()
    assert all(prompt["difference"] is None for prompt in prompts)
    # Both are random, so nothing is accepted, and that is what the verdict says.
    assert code == 1
    assert "of draft tokens are accepted" in report["verdict"]


def test_the_doctor_knows_that_such_a_model_may_have_a_head(trunk: Path) -> None:
    code, output = command("doctor", trunk, "--json")
    assert code == 1
    report = json.loads(output)
    assert "there is no MTP head" in report["problem"]
    assert "mlx-optiq-ext extract-mtp ORIGINAL --into" in report["to_do"]


def test_a_part_of_the_vocabulary_is_refused_with_the_reason(
    trunk: Path, head: Path
) -> None:
    with pytest.raises(SpeculationError, match="HadamardQuantizedLinear"):
        decode(trunk, mtp=str(head), draft_vocab=64)
