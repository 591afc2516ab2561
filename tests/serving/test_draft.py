"""A server speculates with a Gemma-4 and its assistant, also after another model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx_lm
import pytest

from tests.helpers import DEMO
from tests.test_demo_gemma import ASSISTANT
from tests.test_demo_gemma import DEMO as GEMMA

from .conftest import Starter
from .test_speculation import CHAT, COMPLETIONS, Pair, ask, assert_counts_add_up

PROMPTS = ("import os\n", "class Queue:\n", "def read(path):\n", "def main():\n")
# Past the sliding window of 128 tokens, and within it.
BODIES: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": num_tokens}
    for prompt, num_tokens in zip(PROMPTS, (135, 12, 24, 30), strict=True)
]


@pytest.fixture(scope="module")
def pair(start_server: Starter) -> Pair:
    flags = ("--draft", str(ASSISTANT), "--num-draft-tokens", "3")
    return Pair(start_server(*flags, folder=GEMMA), start_server(folder=GEMMA))


def test_replies_are_those_of_plain_serving(pair: Pair) -> None:
    for path in (COMPLETIONS, CHAT):
        for stream in (True, False):
            found = pair.compare(path, stream=stream, max_tokens=40)
        assert assert_counts_add_up(found)[1] > 0


def test_concurrent_texts_are_those_of_single_ones_and_of_mlx_lm(pair: Pair) -> None:
    model, tokenizer = mlx_lm.load(str(GEMMA))
    expected = [
        mlx_lm.generate(model, tokenizer, body["prompt"], max_tokens=body["max_tokens"])
        for body in BODIES
    ]
    single = [ask(pair.speculating, COMPLETIONS, **body).text for body in BODIES]
    assert single == expected
    with ThreadPoolExecutor(4) as pool:
        replies = pool.map(
            lambda body: ask(pair.speculating, COMPLETIONS, **body), BODIES
        )
        found = [reply.text for reply in replies]
    assert found == expected


def test_a_model_that_a_request_names_is_served_in_between(pair: Pair) -> None:
    other = {"model": str(DEMO)}
    bodies = [BODIES[1], BODIES[1] | other, BODIES[2], BODIES[2] | other]
    expected = [ask(pair.plain, COMPLETIONS, **body).text for body in bodies]
    assert len(set(expected)) == 4
    found = [ask(pair.speculating, COMPLETIONS, **body) for body in bodies]
    assert [reply.text for reply in found] == expected
    # The assistant is not one for the other model.
    assert "timings" not in found[1].last
    assert assert_counts_add_up(found[2])[0] > 0
    with ThreadPoolExecutor(4) as pool:
        replies = pool.map(lambda b: ask(pair.speculating, COMPLETIONS, **b), bodies)
        assert [reply.text for reply in replies] == expected
