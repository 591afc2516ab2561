"""The grid of cases in which speculation must equal plain decoding to the bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_optiq_ext import SpeculationStats, spec_generate_step
from tests.gemma import A4B, E4B, load_target
from tests.helpers import (
    ScriptedDrafter,
    assert_same_cache,
    assert_same_tokens,
    changing_depth,
    load_tiny,
    often_right,
)
from tests.rollback.models import (
    in_bfloat16,
    tiny_gemma3,
    tiny_gpt_oss,
    tiny_llama,
)

NUM_TOKENS = 97
NUM_PROMPT_WORDS = 200  # Tokens that every model has.
Dimensions = dict[str, tuple[Any, ...]]
QWEN: Dimensions = {
    "model": ("dense", "moe", "dense-4bit", "moe-4bit", "dense-bf16"),
    "drafter": ("script", "mtp"),
    "num_draft_tokens": (1, 2, 3, 4, "changing"),
    "num_prompt_tokens": (1, 2, 600, 2500),
    "prefill_step_size": (512, 2048),
    "max_tokens": (1, 2, NUM_TOKENS),
    "ending": ("limit", "in a run", "after a run"),
    "kv": ("none", "8 bits", "4 bits from token 20 on"),
    "processors": ("none", "repetition", "presence", "bias"),
}
# Windows are of 8 to 37 tokens, so most of a generation is past them.
WINDOWED: Dimensions = {
    "model": (
        "gemma-e4b",
        "gemma-e4b-bf16",
        "gemma-26b",
        "gemma-e4b-window-37-bf16",
        "gemma3-bf16",
        "gpt-oss",
        "kept-start",
        "kept-start-bf16",
    ),
    "drafter": ("script",),
    "num_draft_tokens": (1, 2, 3, 4, 8, "changing"),
    "num_prompt_tokens": (1, 2, 36, 300),
    "prefill_step_size": (7, 2048),
    "max_tokens": (1, 2, NUM_TOKENS),
    "ending": ("limit", "in a run", "after a run"),
    "kv": ("none",),
    "processors": ("none", "repetition", "bias"),
}
GRIDS = QWEN, WINDOWED
PROCESSORS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {7: 3.0, 19: -2.0}},
}


WINDOWED_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gemma-e4b": lambda: load_target(E4B),
    "gemma-26b": lambda: load_target(A4B),
    "gemma-e4b-window-37": lambda: load_target(E4B, sliding_window=37),
    "gemma3": tiny_gemma3,
    "gpt-oss": tiny_gpt_oss,
    "kept-start": tiny_llama,
}


class Case(NamedTuple):
    model: str
    drafter: str
    num_draft_tokens: int | str
    num_prompt_tokens: int
    prefill_step_size: int
    max_tokens: int
    ending: str
    kv: str
    processors: str

    @property
    def options(self) -> dict[str, Any]:
        kv: dict[str, dict[str, Any]] = {
            "none": {},
            "8 bits": {"kv_bits": 8, "quantized_kv_start": 0},
            "4 bits from token 20 on": {
                "kv_bits": 4,
                "quantized_kv_start": self.num_prompt_tokens + 20,
            },
        }
        return {
            "prefill_step_size": self.prefill_step_size,
            "logits_processors": make_logits_processors(**PROCESSORS[self.processors]),
            "kv_group_size": 32,
            **kv[self.kv],
        }

    @property
    def max_kv_size(self) -> int | None:
        """That of a ring which keeps its first tokens."""
        return 20 if self.model.startswith("kept-start") else None


def all_cases() -> Iterator[Case]:
    for dimensions in GRIDS:
        yield from itertools.starmap(Case, itertools.product(*dimensions.values()))


def covering_cases(dimensions: Dimensions) -> list[Case]:
    """Cases in which every pair of values of two dimensions occurs."""
    missing = {
        pair
        for (one, other) in itertools.combinations(enumerate(dimensions.values()), 2)
        for pair in itertools.product(
            *([(index, value) for value in choices] for index, choices in (one, other))
        )
    }
    chooser, chosen = random.Random(1), []
    while missing:
        candidates = [
            Case(*map(chooser.choice, dimensions.values())) for _ in range(500)
        ]
        best = max(
            candidates, key=lambda case: (len(missing & pairs(case)), worth(case))
        )
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def worth(case: Case) -> tuple[bool, int]:
    """Long generations from short prompts find more in less time."""
    return case.max_tokens == NUM_TOKENS, -case.num_prompt_tokens


def pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def prompt_of(case: Case) -> mx.array:
    return mx.random.randint(
        0, NUM_PROMPT_WORDS, (case.num_prompt_tokens,), key=mx.random.key(5)
    )


@cache
def model_of(kind: str) -> nn.Module:
    if kind in QWEN["model"]:
        return load_tiny(kind)
    name = kind.removesuffix("-bf16")
    model = WINDOWED_MODELS[name]()
    return in_bfloat16(model) if name != kind else model


def check(case: Case) -> SpeculationStats:
    """Compare speculation with plain decoding: tokens, log probabilities, cache."""
    model, prompt, options = model_of(case.model), prompt_of(case), case.options
    plain_cache, own_cache = (
        make_prompt_cache(model, case.max_kv_size) for _ in range(2)
    )
    num_entries, stats = len(plain_cache), SpeculationStats()
    is_changing = case.num_draft_tokens == "changing"
    with changing_depth() if is_changing else nullcontext():
        speculative = take(
            case.ending,
            spec_generate_step(
                prompt,
                model,
                drafter=drafter_of(case),
                num_draft_tokens="auto" if is_changing else case.num_draft_tokens,
                max_tokens=case.max_tokens,
                prompt_cache=own_cache,
                stats=stats,
                **options,
            ),
        )
    steps = generate_step(
        prompt,
        model,
        max_tokens=case.max_tokens,
        prompt_cache=plain_cache,
        **options,
    )
    plain = list(itertools.islice(steps, len(speculative)))
    assert_same_tokens(plain, speculative)
    assert_same_cache(plain_cache, own_cache[:num_entries])
    following = [
        list(
            generate_step(
                mx.array([3]), model, max_tokens=6, prompt_cache=cache_, **options
            )
        )
        for cache_ in (plain_cache, own_cache)
    ]
    assert_same_tokens(*following)
    return stats


def drafter_of(case: Case) -> ScriptedDrafter | None:
    if case.drafter == "mtp":
        return None
    vocab_size = model_of(case.model)(mx.array([[0]])).shape[-1]
    return ScriptedDrafter(plain_tokens(case), vocab_size, often_right)


def plain_tokens(case: Case) -> list[int]:
    steps = generate_step(
        prompt_of(case),
        model_of(case.model),
        max_tokens=NUM_TOKENS,
        max_kv_size=case.max_kv_size,
        **case.options,
    )
    return [token for token, _ in steps]


def take(ending: str, steps: Iterator[Any]) -> list[Any]:
    """Consume a generator to its end, or drop it at a token of the wanted kind."""
    taken = []
    for step in steps:
        taken.append(step)
        is_draft = step[2]
        if ending != "limit" and len(taken) > 10 and is_draft == (ending == "in a run"):
            break
    return taken
