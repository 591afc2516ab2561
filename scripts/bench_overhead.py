"""Measure what the extension costs where it is not used, and in memory where it is.

Start-up and `import mlx_lm`, in CPU time, and plain decoding run in processes that
alternate between the extension switched off (`MLX_OPTIQ_EXT=0`) and on, without any
flag. Memory and prefill compare speculation with plain decoding of one long prompt,
each in its own process; memory is mlx's peak (`mx.get_peak_memory`).

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --model PATH --prompt-tokens 20000
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

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

DECODE = """
from mlx_lm import load, stream_generate
model, tokenizer = load({model!r})
prompt = {prompt!r}
for tokens in (16, {num_tokens}):
    *_, last = stream_generate(model, tokenizer, prompt, max_tokens=tokens)
print(last.generation_tps)
"""
PREFILL = """
import warnings
import mlx.core as mx
from mlx_lm import load, stream_generate
warnings.simplefilter("ignore")
model, tokenizer = load({model!r})
words = tokenizer.encode("def parse_args(argv): return argv\\n")
prompt = (words * ({num_tokens} // len(words) + 1))[:{num_tokens}]
*_, last = stream_generate(model, tokenizer, prompt[:8], max_tokens=8, **{options})
mx.reset_peak_memory()
*_, last = stream_generate(model, tokenizer, prompt, max_tokens=32, **{options})
head = getattr(model, "_mtp", None)
from mlx.utils import tree_reduce
size = tree_reduce(lambda n, x: n + x.nbytes, head.parameters(), 0) if head else 0
print([last.prompt_tps, mx.get_peak_memory(), size])
"""
COLUMNS = ("what", "without", "with", "difference")


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
    rows = {
        "interpreter start, ms of CPU": [
            1e3 * x for x in switched(partial(cpu_seconds, "pass"), 4 * repeats)
        ],
        "import mlx_lm, ms of CPU": [
            1e3 * x for x in switched(partial(cpu_seconds, "import mlx_lm"), repeats)
        ],
        "plain decoding, tok/s": switched(
            partial(
                result_of, DECODE.format(model=model, prompt=PROMPT, num_tokens=tokens)
            ),
            repeats,
        ),
        **prefill(model, prompt_tokens),
    }
    report = {"machine": describe_machine(), "rows": rows}
    write_results(render(report), report, markdown, as_json)
    if plot is not None:
        bars = {name: with_it / without for name, (without, with_it) in rows.items()}
        plot_bars(plot, bars, "With the extension over without")


def switched(measure: Any, repeats: int) -> list[float]:
    """Medians with the extension off and on, in turns."""
    pairs = [(measure(False), measure(True)) for _ in range(repeats)]
    return [statistics.median(values) for values in zip(*pairs, strict=True)]


def cpu_seconds(code: str, is_on: bool) -> float:
    """CPU time of a process, which what else the machine does hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=_environment(is_on), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def result_of(code: str, is_on: bool) -> Any:
    """What code that runs in a process of its own prints last, as JSON."""
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, env=_environment(is_on), text=True)
    return json.loads(output.splitlines()[-1])


def prefill(model: str, num_tokens: int) -> dict[str, list[float]]:
    """Prefill speed and peak memory, plain and with the MTP head."""
    (plain_tps, plain_memory, _), (own_tps, own_memory, head) = (
        result_of(
            PREFILL.format(model=model, num_tokens=num_tokens, options=options), True
        )
        for options in ({}, {"mtp": True})
    )
    return {
        f"prefill of {num_tokens} tokens, tok/s": [plain_tps, own_tps],
        "peak memory, the head apart, MB": [
            plain_memory / 1e6,
            (own_memory - head) / 1e6,
        ],
    }


def _environment(is_on: bool) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLX_OPTIQ_EXT"}
    return environment if is_on else environment | {"MLX_OPTIQ_EXT": "0"}


def render(report: dict[str, Any]) -> str:
    rows = [
        (name, f"{without:.2f}", f"{own:.2f}", f"{own / without - 1:+.1%}")
        for name, (without, own) in report["rows"].items()
    ]
    return "\n\n".join(
        [
            "# What the extension costs",
            markdown_machine(report["machine"]),
            markdown_table(COLUMNS, rows),
        ]
    )


if __name__ == "__main__":
    main()
