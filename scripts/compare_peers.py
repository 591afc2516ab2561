"""Decode the demo models with mlx-optiq-ext, mlx-vlm and mlx-optiq, side by side.

python scripts/compare_peers.py [--family qwen] [--depth N ...] [--tokens N]
    [--repeats N] [--temp T] [--json FILE]

Installs each of the others in a virtual environment of its own, the first time. All
decode the same tokens of the same prompts, in turns, one at a time and on one thread;
loading and prompts are not in the times, and the first turn warms up. Prints Markdown.

A cache is right if it holds the prompt and all tokens that were yielded, no more, and
gives the logits that a cache filled without speculation gives; so does mlx-lm leave it.
It is looked at where the limit of tokens is reached and where the reader stops before.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_tokenizer
from peers._environments import PEERS, Process, default_extra, prepare
from peers._report import Contender, Results, contenders, table

import mlx_optiq_ext
from mlx_optiq_ext.cli.demo import FAMILIES, GEMMA, MODEL

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "class Queue:\n",
    'def parse_args(argv):\n    """Parse the command line."""\n',
    "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
    "def merge(left, right):\n    result = []\n",
    "async def fetch(session, url):\n",
)
STOPS = (20, 21)  # tokens after which a reader leaves
NUM_INSPECTED = 2  # prompts after which caches are looked into


def main() -> None:
    args = _parse_args()
    pythons = {peer: prepare(peer, args.environments, args.extra) for peer in PEERS}
    pythons["ours"] = Path(sys.executable)
    print(
        f"mlx-optiq-ext {mlx_optiq_ext.__version__}, {', '.join(PEERS.values())}, "
        f"mlx {mx.__version__}, {mx.default_device()}, {platform.platform()}; "
        f"{args.tokens} tokens, temperature {args.temp:g}"
    )
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        places = checkpoints(Path(scratch))
        for family in args.family or places:
            folder, draft = places[family]
            found[family] = compare(pythons, folder, draft, args)
            print(f"\n### {family}\n\n{table(found[family], args.temp == 0)}")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(found), indent=1))


def checkpoints(scratch: Path) -> dict[str, tuple[Path, Path]]:
    """Make folders of models and their drafters, in a layout that everyone reads."""
    gemma = scratch / "gemma"
    shutil.copytree(GEMMA, gemma)
    config = json.loads((gemma / "config.json").read_text())
    # To mlx-vlm, no entry means that there is no such tower, and null is an error.
    del config["vision_config"]
    (gemma / "config.json").write_text(json.dumps(config))
    return {
        "qwen": (MODEL, MODEL),
        "gemma": (gemma, gemma / "assistant"),
    }


def compare(
    pythons: dict[str, Path], folder: Path, draft: Path, args: argparse.Namespace
) -> dict[Contender, Results]:
    """Let all contenders decode all prompts, in turns."""
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    processes = {
        name: Process(name, python, folder, draft) for name, python in pythons.items()
    }
    results = {contender: Results() for contender in contenders(args.depth)}
    for turn in range(args.repeats + 1):
        for index, prompt in enumerate(prompts):
            for contender, found in results.items():
                process = processes[contender.module]
                request = request_of(contender, prompt, args, seed=turn)
                reply = process.ask(**request)
                if turn:
                    found.add_run(index, reply)
                elif index < NUM_INSPECTED:
                    look_into_caches(process, request, found)
        print(f"{folder.name}: turn {turn} of {args.repeats}", file=sys.stderr)
    for process in processes.values():
        process.end()
    return results


def request_of(
    contender: Contender, prompt: list[int], args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "num_draft_tokens": contender.num_draft_tokens,
        "max_tokens": args.tokens,
        "sampling": {"temp": args.temp, "top_p": args.top_p, "top_k": args.top_k},
        "seed": seed,
    }


def look_into_caches(process: Process, request: dict[str, Any], found: Results) -> None:
    found.add_cache("limit", process.ask(**request, inspects=True))
    for stop in STOPS:
        reply = process.ask(**request, inspects=True, stop_after=stop)
        found.add_cache("stop", reply)


def as_json(found: dict[str, dict[Contender, Results]]) -> dict[str, Any]:
    return {
        family: {contender.name: asdict(one) for contender, one in results.items()}
        for family, results in found.items()
    }


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".peers",
        help="a folder to keep the environments of the others in",
    )
    parser.add_argument(
        "--extra",
        default=default_extra(),
        help="of mlx, for its backend: cpu, cuda12 or cuda13 (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
