"""Time what a draft costs, with all tokens to choose from and with some of them.

python scripts/bench_draft_vocab.py [--size 0.8B] [--weights float32] [--repeats N]

Needs no trained weights: a random head and output layer of the sizes of a Qwen3.5, and
four of its layers, from whose time that of a step of the whole model is calculated. It
cannot tell what drafts from fewer tokens lose in acceptance.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5

import mlx_optiq_ext
from mlx_optiq_ext.drafters._draft_vocab import SubsetProjection, choose_tokens
from mlx_optiq_ext.heads import MTPHead

VOCAB_SIZE = 248_320
NUM_KEPT = (65_536, 32_768, 16_384)
NUM_SEEN = 256  # tokens in the caches
PERIOD = 4  # layers, the last with full attention


class Size(NamedTuple):
    """The sizes of a Qwen3.5 model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_value_heads: int


SIZES = {
    "0.8B": Size(1024, 3584, 24, 8, 2, 16),
    "2B": Size(2048, 6144, 24, 8, 2, 16),
    "4B": Size(2560, 9216, 32, 16, 4, 32),
}
WEIGHTS = ("float32", "bfloat16", "4bit")


def main() -> None:
    args = _parse_args()
    print(
        f"mlx-optiq-ext {mlx_optiq_ext.__version__}, mlx {mx.__version__}, "
        f"{mx.default_device()}, {platform.platform()}\n"
    )
    print("| model | weights | target step, ms | tokens | draft, ms | of a step |")
    print("|---|---|---|---|---|---|")
    for size in args.size or SIZES:
        report(size, args.weights, measure(SIZES[size], args.weights, args.repeats))


def report(size: str, weights: str, times: dict[str, float]) -> None:
    step = times.pop("step")
    for kept, seconds in times.items():
        print(
            f"| {size} | {weights} | {step * 1e3:.0f} | {kept} | {seconds * 1e3:.1f} | "
            f"{seconds / step:.3f} |"
        )


def measure(size: Size, weights: str, num_repeats: int) -> dict[str, float]:
    """Time a step of the target, and drafts from numbers of tokens."""
    args = text_args(size)
    model, head = qwen3_5.TextModel(args), MTPHead(args)
    for module in (model, head):
        prepare(module, weights)
    table = model.model.embed_tokens
    runs: dict[str, Callable[[], mx.array]] = {
        "layers": layers(model),
        f"{VOCAB_SIZE:,}": draft(model, head, table.as_linear),
    }
    for num_kept in NUM_KEPT:
        subset = SubsetProjection(table, choose_tokens(num_kept, [], []))
        runs[f"{num_kept:,}"] = draft(model, head, subset)
    state = one_state(model)
    runs["output layer"] = lambda: table.as_linear(state)
    times = interleaved(runs, num_repeats)
    step = times.pop("layers") * size.num_layers / PERIOD + times.pop("output layer")
    return {"step": step, **times}


def text_args(size: Size) -> Any:
    return qwen3_5.TextModelArgs(
        model_type="qwen3_5_text",
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=PERIOD,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=size.num_value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        full_attention_interval=PERIOD,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
    )


def prepare(module: nn.Module, weights: str) -> None:
    module.set_dtype(mx.bfloat16 if weights == "bfloat16" else mx.float32)
    if weights == "4bit":
        nn.quantize(module, group_size=64, bits=4)
    mx.eval(module.parameters())


def layers(model: nn.Module) -> Callable[[], mx.array]:
    """Make a step of the layers alone, after a prompt."""
    cache = model.make_cache()
    mx.eval(model.model(mx.zeros((1, NUM_SEEN), mx.int32), cache))
    return lambda: model.model(mx.zeros((1, 1), mx.int32), cache)


def draft(
    model: nn.Module, head: MTPHead, project: Callable[[mx.array], mx.array]
) -> Callable[[], mx.array]:
    """Make a greedy draft of one token, as the decode loop computes it."""
    cache = qwen3_5.KVCache()
    states = mx.zeros((1, NUM_SEEN, model.args.hidden_size), one_state(model).dtype)
    mx.eval(head(states, states, cache))

    def run() -> mx.array:
        state = one_state(model)
        logits = project(head(state, state, cache))
        cache.trim(1)
        return mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)

    return run


def one_state(model: nn.Module) -> mx.array:
    return model.model.embed_tokens(mx.zeros((1, 1), mx.int32))


def interleaved(
    runs: dict[str, Callable[[], mx.array]], num_repeats: int
) -> dict[str, float]:
    """Measure the median seconds of each in turns, without the first turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            mx.eval(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--weights", choices=WEIGHTS, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
