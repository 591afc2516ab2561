"""Writes a head beside a model, as this package, mlx-optiq and mlx-vlm read it.

The file is ``optiq/mtp.safetensors``. Loaders that take every ``*.safetensors`` file of
a folder for weights of the model (mlx-vlm, LM Studio) do not look into folders within
it. The index of the model stays as it is: mlx-vlm 0.6.5 adds one to all norms of a
model whose index has ``mtp.*``.

Names are those of mlx-lm's modules with the prefix ``mtp.``, norms are absolute, and
the file is marked as written for MLX, by which mlx-vlm and this package know the norms.
A copy of the model's ``config.json`` beside the head makes the folder a drafter for
mlx-vlm, with ``--draft-model MODEL/optiq``. The copy has the same bytes because LM
Studio puts the files of all folders into one.

In ``config.json``, ``mlx_lm_extra_tensors`` names the file for mlx-optiq, and
``mtplx_mtp_quantization`` says, to both, how the head is quantised. Where mlx-optiq
finds that block it expects quantised routers too. So it is left out for a mixture of
experts that is quantised as the model is, which mlx-optiq then reads if the mode is
affine. It cannot read experts in other modes, nor a head that came with layers of
different numbers of bits.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ._config import block, text_config
from ._head import MTPHead
from ._host import Params, quantization_of, usual_params
from ._hub import CONFIG

FOLDER = "optiq"
HEAD = f"{FOLDER}/mtp.safetensors"
COPY = f"{FOLDER}/{CONFIG}"

_BLOCK = "mtplx_mtp_quantization"
_STAGING = ".mtp-"


def add_sidecar(folder: Path, head: MTPHead) -> Path:
    """Write a head into the folder of a model, all of it or nothing.

    Files are written apart and moved into place when they are complete, the head last:
    as long as it is missing, what the configuration says of it is without effect.

    Args:
        folder (Path): The folder with the model's ``config.json``.
        head (MTPHead): The head.

    Returns:
        Path: The file with the head.

    Raises:
        OSError: If a file cannot be written. The error names it.
    """
    for left_over in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    config = declare(json.loads((folder / CONFIG).read_text(encoding="utf-8")), head)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as name:
        staging = Path(name)
        (staging / FOLDER).mkdir()
        for file in (CONFIG, COPY):
            with _named(folder / file):
                text = json.dumps(config, indent=4)
                (staging / file).write_text(text, encoding="utf-8")
        weights = {f"mtp.{n}": x for n, x in tree_flatten(head.parameters())}
        with _named(folder / HEAD):
            mx.save_safetensors(str(staging / HEAD), weights, {"format": "mlx"})
        _move(staging, folder, (CONFIG, COPY, HEAD))
    return folder / HEAD


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Let errors name the file that was to be written in the end.

    The error of a full disk names no file, and MLX raises no OSError.
    """
    try:
        yield
    except (OSError, RuntimeError) as exc:
        code = getattr(exc, "errno", None) or errno.EIO
        reason = getattr(exc, "strerror", None) or str(exc)
        raise OSError(code, reason, str(file)) from exc


def declare(config: dict[str, Any], head: MTPHead) -> dict[str, Any]:
    """Make a configuration say that a head is beside the model, and return it.

    Args:
        config (dict): The model's configuration, which is not changed.
        head (MTPHead): The head.
    """
    config = {name: value for name, value in config.items() if name != _BLOCK}
    extra = block(config, "mlx_lm_extra_tensors")
    config["mlx_lm_extra_tensors"] = extra | {"mtp_file": HEAD}
    text = text_config(config)
    if not text.get("mtp_num_hidden_layers"):
        changed = dict(text, mtp_num_hidden_layers=1)
        config = changed if text is config else config | {"text_config": changed}
    declared = _quantization_block(config, head)
    return config | {_BLOCK: declared} if declared else config


def _quantization_block(config: dict[str, Any], head: MTPHead) -> Params | None:
    """Describe a head's quantisation, None if it is in full or that of the model."""
    by_path = quantization_of(head)
    usual = usual_params(by_path)
    if usual is None:
        return None
    others = {f"mtp.{path}": x for path, x in by_path.items() if x != usual}
    model = {"mode": "affine"} | block(config, "quantization")
    is_models_own = not others and usual == {name: model.get(name) for name in usual}
    if is_models_own and "switch_mlp" in head.layers[0].mlp:
        return None
    policy = "all" if "fc" in by_path else "cyankiwi"
    return usual | {"policy": policy, "prequantized": True} | others


def _move(staging: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move files to their places; if that fails, put back what was there."""
    is_new_folder = not (folder / FOLDER).exists()
    replaced: list[str] = []
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        for name in names:
            if (folder / name).is_file():
                shutil.copy2(folder / name, staging / f"{name}.old")
            replaced.append(name)
            (staging / name).replace(folder / name)
    except BaseException:
        _put_back(staging, folder, replaced)
        if is_new_folder:
            with suppress(OSError):
                (folder / FOLDER).rmdir()
        raise


def _put_back(staging: Path, folder: Path, replaced: list[str]) -> None:
    for name in replaced:
        if (old := staging / f"{name}.old").is_file():
            old.replace(folder / name)
        elif not (staging / name).exists():
            (folder / name).unlink(missing_ok=True)
