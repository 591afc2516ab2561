"""Time a model plain and with its drafter, interleaved in one run.

python scripts/bench_demo.py [--family gemma] [--model PATH [--draft PATH]]
    [--max-tokens N] [--repeats N]

Prints the median decoding speed of each prompt, plain, and the speed-up at each number
of draft tokens; the last row is the geometric mean.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import warnings
from collections import defaultdict
from typing import Any

import mlx.core as mx
from mlx_lm import load, stream_generate

import mlx_optiq_ext
from mlx_optiq_ext.cli.demo import FAMILIES

PROMPTS = (
    "class Queue:\n",
    'def parse_args(argv):\n    """Parse the command line."""\n',
    "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
    "def merge(left, right):\n    result = []\n",
    "async def fetch(session, url):\n",
)
DEPTHS = (0, 1, 2, 3)
MIN_TOKENS = 60  # A shorter text has no speed worth the name.

Speeds = dict[str, dict[int, list[float]]]


def main() -> None:
    args = _parse_args()
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    folder, drafter = FAMILIES[args.family]
    if args.model is not None:
        drafter = {"draft": args.draft} if args.draft else {"mtp": True}
    model = str(args.model or folder)
    speeds = measure(model, drafter, args.max_tokens, args.repeats)
    print(
        f"mlx-optiq-ext {mlx_optiq_ext.__version__}, mlx {mx.__version__}, "
        f"{mx.default_device()}, {platform.platform()}\n"
    )
    print_table(speeds)


def measure(
    path: str, drafter: dict[str, Any], max_tokens: int, num_repeats: int
) -> Speeds:
    model, tokenizer = load(path)
    speeds: Speeds = defaultdict(lambda: defaultdict(list))
    for repeat in range(num_repeats + 1):
        for prompt in PROMPTS:
            for depth in DEPTHS:
                options = {**drafter, "num_draft_tokens": depth} if depth else {}
                *_, last = stream_generate(
                    model, tokenizer, prompt, max_tokens=max_tokens, **options
                )
                # The first repeat warms up.
                if repeat and last.generation_tokens >= MIN_TOKENS:
                    speeds[prompt][depth].append(last.generation_tps)
    return speeds


def print_table(speeds: Speeds) -> None:
    depths = [depth for depth in DEPTHS if depth]
    print("| prompt | plain tok/s | " + " | ".join(f"depth {d}" for d in depths) + " |")
    print("|---" * (len(depths) + 2) + "|")
    ratios: dict[int, list[float]] = defaultdict(list)
    for prompt, by_depth in speeds.items():
        plain = statistics.median(by_depth[0])
        for depth in depths:
            ratios[depth].append(statistics.median(by_depth[depth]) / plain)
        cells = [f"{ratios[depth][-1]:.2f}x" for depth in depths]
        print(f"| `{prompt.split(chr(10))[0]}` | {plain:.0f} | {' | '.join(cells)} |")
    means = [f"{statistics.geometric_mean(ratios[depth]):.2f}x" for depth in depths]
    print(f"| geometric mean | | {' | '.join(means)} |")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="qwen")
    parser.add_argument("--model", help="a folder or a Hub id, not a demo model")
    parser.add_argument("--draft", help="its drafter, by default its MTP head")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
