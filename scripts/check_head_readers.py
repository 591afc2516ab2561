"""Have mlx-optiq and mlx-vlm read heads that this project wrote, with their own code.

python scripts/check_head_readers.py [--python PYTHON] [--peer mlx-optiq | mlx-vlm ...]

Each is installed in a virtual environment of its own. Models are small and random; what
counts is that a head has the same numbers there as here. mlx-optiq is known not to read
experts in other modes than affine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from mlx_lm.utils import load_model

from mlx_optiq_ext.heads import Host, load_head

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.heads.variants import DENSE, MOE, checkpoint, in_full  # noqa: E402

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4-bit": {"quantize": True},
    "8-bit": {"quantize": True, "q_bits": 8},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "mixed": {"quantize": True, "q_group_size": 64, "quant_predicate": "mixed_4_6"},
}

# The last lines of each are the peer's own way of loading a head.
PROBE = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten

folder, output = Path(sys.argv[1]), sys.argv[2]

def save(head):
    tensors = dict(tree_flatten(head.parameters()))
    for path, module in head.named_modules():
        if hasattr(module, "bits"):
            names = [f"{path}.{name}" for name in ("weight", "scales", "biases")]
            packed = [tensors.pop(name, None) for name in names]
            tensors[names[0]] = mx.dequantize(
                *packed, module.group_size, module.bits, module.mode
            )
    tensors = {name: x.astype(mx.float32) for name, x in tensors.items()}
    mx.save_safetensors(output, tensors)
"""


class Peer(NamedTuple):
    """Another program that reads heads."""

    requirements: tuple[str, ...]
    probe: str
    unreadable: tuple[tuple[str, str], ...] = ()


PEERS = {
    "mlx-optiq": Peer(
        ("mlx-optiq==0.7.7", "mlx-lm[cpu]"),
        PROBE + """
from mlx_lm.utils import load_model
from optiq.runtime.mtp.runtime import attach
model, _ = load_model(folder)
attach(model, None, folder)
save(model.language_model.mtp)
""",
        ((MOE, "mxfp4"),),
    ),
    "mlx-vlm": Peer(
        ("mlx-vlm==0.7.10", "mlx[cpu]"),
        PROBE + """
from mlx_vlm.speculative.drafters import load_drafter
head, kind = load_drafter(str(folder / "optiq"))
assert kind == "mtp"
save(head)
""",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peer", choices=PEERS, action="append")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models = write_models(place)
        outcomes = [
            check(peer, args.python, models, place) for peer in args.peer or PEERS
        ]
    return 0 if all(outcomes) else 1


def write_models(place: Path) -> dict[tuple[str, str], Path]:
    """Convert a dense model and a mixture of experts in each precision."""
    models = {}
    for kind in (DENSE, MOE):
        original = checkpoint(kind, place / kind, mx.bfloat16)
        for precision, options in PRECISIONS.items():
            folder = place / f"{kind}-{precision}"
            mlx_lm.convert(str(original), str(folder), **options)
            models[kind, precision] = folder
    return models


def check(
    name: str, python: str, models: dict[tuple[str, str], Path], place: Path
) -> bool:
    """Compare all models in one peer, and tell whether it reads them as expected."""
    peer, environment = PEERS[name], place / name
    subprocess.run([python, "-m", "venv", environment], check=True)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*command, *peer.requirements], check=True)
    is_expected = True
    for key, folder in models.items():
        outcome = read(environment, peer.probe, folder, place / "read.safetensors")
        is_known = key in peer.unreadable
        is_expected &= (outcome == "the same") != is_known
        note = " (known)" if is_known else ""
        print(f"{name:<10} {key[0]:<16} {key[1]:<6} {outcome}{note}", flush=True)
    return is_expected


def read(environment: Path, probe: str, model: Path, output: Path) -> str:
    """Let a peer read one head, and say what became of it."""
    output.unlink(missing_ok=True)
    process = subprocess.run(
        [environment / "bin" / "python", "-c", probe, model, output],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        return f"not read: {process.stderr.strip().splitlines()[-1][:90]}"
    found = mx.load(str(output))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = Host.of(load_model(model, lazy=True)[0])
        expected = in_full(load_head(model, host.args, host.dtype))
    is_same = found.keys() == expected.keys() and all(
        mx.array_equal(x, expected[name].astype(mx.float32)).item()
        for name, x in found.items()
    )
    return "the same" if is_same else "DIFFERENT"


if __name__ == "__main__":
    sys.exit(main())
