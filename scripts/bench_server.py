"""Time a server that speculates against one that does not, interleaved in one run.

python scripts/bench_server.py [--family gemma] [--max-tokens N] [--num-draft-tokens N]
    [--repeats N]

Prints medians and ratios: the wall time of eight requests at once, and the generation
time of single ones, measured in the server, beside that of mlx-lm without a server.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
from _served import Served, speculation_flags
from mlx_lm import load, stream_generate

import mlx_optiq_ext
from mlx_optiq_ext.cli.demo import FAMILIES

PROMPTS = (
    "class Queue:\n",
    'def parse_args(argv):\n    """Parse the command line."""\n',
    "import os\n\n\nclass Path:\n    def __init__(self, path):\n",
    "def merge(left, right):\n    result = []\n",
    "async def fetch(session, url):\n",
    "def test_read(tmp_path):\n",
    "class Reader:\n    def __init__(self, file):\n",
    "def main():\n    parser = argparse.ArgumentParser()\n",
)
KINDS = ("plain", "speculative")
LATENCY = "e2e_request_latency_seconds_sum"
FIRST_TOKEN = "time_to_first_token_seconds_sum"

Times = dict[tuple[str, str], list[float]]


class Bench:
    """Two servers of one model, and the model itself.

    Args:
        servers (dict): By kind.
        model, tokenizer: As ``mlx_lm.load`` returns them.
        options (dict): With which ``stream_generate`` speculates.
        max_tokens (int): Of each request.
    """

    def __init__(
        self,
        servers: dict[str, Served],
        loaded: tuple[Any, Any],
        options: dict[str, Any],
        max_tokens: int,
    ):
        self._servers = servers
        self._loaded = loaded
        self._options = {"plain": {}, "speculative": options}
        self._max_tokens = max_tokens
        self.num_tokens: dict[str, int] = {}
        self._texts = [self._text(prompt) for prompt in PROMPTS]

    def eight(self, kind: str) -> float:
        """Time until all requests that were sent at once are answered, in seconds."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            texts = list(pool.map(lambda p: self._ask(kind, p), PROMPTS))
        seconds = time.perf_counter() - start
        if texts != self._texts:
            raise SystemExit("the texts are not those of mlx-lm")
        return seconds

    def alone(self, kind: str) -> float:
        """Time requests in the server one by one, from first token to last."""
        before = self._seconds(kind)
        for prompt in PROMPTS:
            self._ask(kind, prompt)
        # A request is counted after its reply.
        time.sleep(0.2)
        return self._seconds(kind) - before

    def generate(self, kind: str) -> float:
        """Time generations without a server, from first tokens to ends, in seconds."""
        return sum(self._generate(kind, prompt) for prompt in PROMPTS)

    def _ask(self, kind: str, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": self._max_tokens, "temperature": 0}
        _, reply = self._servers[kind].ask("POST", "/v1/completions", body)
        return reply["choices"][0]["text"]

    def _seconds(self, kind: str) -> float:
        text = self._servers[kind].metrics()
        latency, first_token = (
            float(re.findall(rf"^{name} (\S+)", text, re.MULTILINE)[0])
            for name in (LATENCY, FIRST_TOKEN)
        )
        return latency - first_token

    def _generate(self, kind: str, prompt: str) -> float:
        *_, last = stream_generate(
            *self._loaded, prompt, self._max_tokens, **self._options[kind]
        )
        self.num_tokens[prompt] = last.generation_tokens
        return last.generation_tokens / last.generation_tps

    def _text(self, prompt: str) -> str:
        return "".join(
            response.text
            for response in stream_generate(*self._loaded, prompt, self._max_tokens)
        )


def measure(bench: Bench, num_repeats: int) -> Times:
    ways: dict[str, Callable[[str], float]] = {
        "eight at once": bench.eight,
        "one alone": bench.alone,
        "generate": bench.generate,
    }
    times: Times = defaultdict(list)
    for repeat in range(num_repeats + 1):
        for name, run in ways.items():
            for kind in KINDS:
                seconds = run(kind)
                # The first repeat warms up.
                if repeat:
                    times[name, kind].append(seconds)
    return times


def print_table(times: Times) -> None:
    medians = {case: statistics.median(found) for case, found in times.items()}
    print("| seconds | plain | speculative | speculative / plain |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in times):
        plain, speculative = (medians[name, kind] for kind in KINDS)
        print(
            f"| {name} | {plain:.3f} | {speculative:.3f} | {speculative / plain:.2f} |"
        )
    ratios = (medians["one alone", k] / medians["generate", k] for k in KINDS)
    print("| one alone / generate | {:.2f} | {:.2f} | |".format(*ratios))


def main() -> None:
    args = _parse_args()
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
    folder, drafter = FAMILIES[args.family]
    options = drafter | {"num_draft_tokens": args.num_draft_tokens}
    flags = speculation_flags(args.family)
    flags += ("--num-draft-tokens", str(args.num_draft_tokens))
    with Served(args.family) as plain, Served(args.family, *flags) as speculative:
        servers = {"plain": plain, "speculative": speculative}
        bench = Bench(servers, load(str(folder)), options, args.max_tokens)
        times = measure(bench, args.repeats)
    print(
        f"mlx-optiq-ext {mlx_optiq_ext.__version__}, mlx {mx.__version__}, "
        f"{mx.default_device()}, {platform.platform()}, {args.family}, "
        f"{sum(bench.num_tokens.values())} tokens, depth {args.num_draft_tokens}\n"
    )
    print_table(times)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="qwen")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-draft-tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
