"""Measure what the extension costs where it is not used, and in memory where it is.

The start of an interpreter is the time of the start-up file's line, in processes that
have run nothing else. `import mlx_lm` is the CPU time of processes that alternate
between the extension switched off (`MLX_OPTIQ_EXT=0`) and on, without any flag. Two
such processes decode plainly, in turns. Memory and prefill compare speculation with
plain decoding of one long prompt, in processes that alternate too; memory is mlx's peak
(`mx.get_peak_memory`). The difference is the median of those of neighbours.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --model PATH --prompt-tokens 20000
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from _benchmarks import (
    markdown_machine,
    markdown_table,
    output_options,
    plot_bars,
    write_results,
)

from mlx_optiq_ext.cli._machine import describe_machine
from mlx_optiq_ext.cli.demo import MODEL, PROMPT

OFF = {"MLX_OPTIQ_EXT": "0"}
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
START_UP_LINE = (Path(__file__).parent / "mlx_optiq_ext.pth").read_text().strip()

# With -S no start-up file is run before this one. Every interpreter imports `site`.
START = """
import site, sys, time
sys.path.append({folder!r})
start = time.perf_counter()
{line}
print(1e3 * (time.perf_counter() - start))
"""
IMPORT = """
import time
import mlx_lm
print(1e3 * time.process_time())
"""
# Generates whenever it is sent a line.
DECODE = """
import sys, time
from mlx_lm import load, stream_generate
model, tokenizer = load({model!r})
for _ in sys.stdin:
    responses = stream_generate(model, tokenizer, {prompt!r}, max_tokens={num_tokens})
    next(responses)
    start = time.process_time()
    num_tokens = sum(1 for _ in responses)
    print(1e3 * (time.process_time() - start) / num_tokens, flush=True)
"""
PREFILL = """
import warnings
import mlx.core as mx
from mlx.utils import tree_reduce
from mlx_lm import load, stream_generate
warnings.simplefilter("ignore")
model, tokenizer = load({model!r})
words = tokenizer.encode("def parse_args(argv): return argv\\n")
prompt = (words * ({num_tokens} // len(words) + 1))[:{num_tokens}]
*_, last = stream_generate(model, tokenizer, prompt[:8], max_tokens=8, **{options})
mx.reset_peak_memory()
*_, last = stream_generate(model, tokenizer, prompt, max_tokens=32, **{options})
head = getattr(model, "mtp", None)
size = tree_reduce(lambda n, x: n + x.nbytes, head.parameters(), 0) if head else 0
print([last.prompt_tps, (mx.get_peak_memory() - size) / 1e6])
"""
COLUMNS = ("what", "without", "with", "difference")


class Cost(NamedTuple):
    """Medians without and with the extension, and the median of their quotients."""

    without: float
    own: float
    quotient: float | None = None


@click.command()
@click.option("--model", default=str(MODEL), help="A model with an MTP head.")
@click.option("--repeats", default=11, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--prompt-tokens", default=3000, show_default=True)
@output_options
def main(
    model: str,
    repeats: int,
    tokens: int,
    prompt_tokens: int,
    markdown: Path | None,
    as_json: Path | None,
    plot: Path | None,
) -> None:
    """Measure start-up, plain decoding, prefill and memory."""
    costs = {
        "added to the start of the interpreter, ms": Cost(0.0, start_up(4 * repeats)),
        "import mlx_lm, ms of CPU": compare(imports, repeats),
        "plain decoding, ms of CPU a token": decoding(model, tokens, repeats),
        **prefill(model, prompt_tokens, max(repeats // 4, 1)),
    }
    machine = describe_machine()
    report = {
        "machine": machine,
        "costs": {name: cost._asdict() for name, cost in costs.items()},
    }
    write_results(render(machine, costs), report, markdown, as_json)
    if plot is not None:
        bars = {name: cost.quotient for name, cost in costs.items() if cost.quotient}
        plot_bars(plot, bars, "With the extension over without")


def start_up(repeats: int) -> float:
    """Time the line of the start-up file; the median in milliseconds."""
    folder = str(Path(__file__).parents[1])
    code = START.format(folder=folder, line=START_UP_LINE)
    result_of(code, "-S")  # Installers compile what they install.
    return statistics.median(result_of(code, "-S") for _ in range(repeats))


def imports(is_on: bool) -> Any:
    return result_of(IMPORT, is_on=is_on)


def decoding(model: str, num_tokens: int, repeats: int) -> Cost:
    """Time plain decoding by two processes in turns, after one turn to warm up."""
    code = DECODE.format(model=model, prompt=PROMPT, num_tokens=num_tokens)
    with start(code, False) as without, start(code, True) as own:

        def measure(is_on: bool) -> float:
            return ask(own if is_on else without)

        compare(measure, 1)
        return compare(measure, repeats)


def compare(measure: Callable[[bool], float], repeats: int) -> Cost:
    return cost_of([(measure(False), measure(True)) for _ in range(repeats)])


def cost_of(pairs: list[tuple[float, float]]) -> Cost:
    without, own = map(statistics.median, zip(*pairs, strict=True))
    return Cost(without, own, statistics.median(b / a for a, b in pairs))


def ask(process: subprocess.Popen[str]) -> float:
    """Send a process a line and read its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return float(process.stdout.readline())


def prefill(model: str, num_tokens: int, repeats: int) -> dict[str, Cost]:
    """Measure the speed and peak memory of prefill, plain and with the MTP head."""

    def measure(options: dict[str, Any]) -> Any:
        return result_of(
            PREFILL.format(model=model, num_tokens=num_tokens, options=options)
        )

    pairs = [(measure({}), measure({"mtp": True})) for _ in range(repeats)]
    names = f"prefill of {num_tokens} tokens, tok/s", "peak memory, the head apart, MB"
    return {
        name: cost_of([(plain[index], own[index]) for plain, own in pairs])
        for index, name in enumerate(names)
    }


def result_of(code: str, *flags: str, is_on: bool = True) -> Any:
    """Run code in a process of its own, and read the JSON that it prints last."""
    command = [sys.executable, *flags, "-c", code]
    output = subprocess.check_output(command, env=_environment(is_on), text=True)
    return json.loads(output.splitlines()[-1])


def start(code: str, is_on: bool) -> subprocess.Popen[str]:
    """Start code in a process that can be asked."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(is_on),
        text=True,
    )


def _environment(is_on: bool) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in (*OFF, NO_BYTECODE)}
    return environment if is_on else environment | OFF


def render(machine: dict[str, str], costs: dict[str, Cost]) -> str:
    rows = [
        (
            name,
            f"{cost.without:.2f}",
            f"{cost.own:.2f}",
            "" if cost.quotient is None else f"{cost.quotient - 1:+.1%}",
        )
        for name, cost in costs.items()
    ]
    return "\n\n".join(
        [
            "# What the extension costs",
            markdown_machine(machine),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
