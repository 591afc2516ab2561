"""A sampler or a logits processor that raises ends its own request and no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest

from mlx_optiq_ext.serving._errors import APIError
from mlx_optiq_ext.serving._recovery import run_again
from mlx_optiq_ext.serving._state import ServerState
from tests.helpers import DEMO

from .conftest import START, ServerProcess, Starter
from .test_speculation import (
    BODIES,
    CHAT,
    COMPLETIONS,
    Reply,
    ask,
    assert_counts_add_up,
)


def test_every_request_gets_an_exception_of_its_own() -> None:
    class Generator:
        _is_distributed = False
        state = ServerState()

    generator, queues = Generator(), [Queue[Any](), Queue[Any]()]
    generator.state.waiting.update(queues)
    errors = iter([ValueError("broken on purpose"), None])

    def loop() -> None:
        if (error := next(errors)) is not None:
            raise error

    run_again(generator, loop)
    first, second = (queue.get_nowait() for queue in queues)
    assert first is not second
    for error in (first, second):
        assert isinstance(error, APIError)
        assert error.status == 500
        assert "broken on purpose" in error.message
    assert not generator.state.waiting


# A negative bias of token 0 tells at which call a processor raises, a top_k of 777 that
# the sampler does, at its fourth.
FAILING = f"""
from itertools import count
from mlx_lm import server
make_processors, make_sampler = server._make_logits_processors, server._make_sampler
def fail_after(num_calls, inner):
    calls = count(1)
    def call(*args):
        if next(calls) > num_calls:
            raise RuntimeError("broken on purpose")
        return inner(*args)
    return call
def processors(args):
    made = make_processors(args)
    if num_calls := (args.logits.logit_bias or {{}}).get(0):
        # The check of a request makes its own.
        if hasattr(args, "was_checked"):
            made.append(fail_after(-num_calls - 1, lambda _, logits: logits))
        args.was_checked = True
    return made
def sampler(args, tokenizer):
    made = make_sampler(args, tokenizer)
    return fail_after(3, made) if args.sampling.top_k == 777 else made
server._make_logits_processors, server._make_sampler = processors, sampler
{START}
"""

BY_PROCESSOR = {"logit_bias": {"0": -5}}
BY_SAMPLER = {"top_k": 777}
AT_ONCE = {"logit_bias": {"0": -1}}


@pytest.fixture(scope="module")
def failing(start_server: Starter) -> dict[str, ServerProcess]:
    return {
        "plain": start_server(folder=DEMO, start=FAILING),
        "mtp": start_server(
            *("--mtp", "--num-draft-tokens", "1"), folder=DEMO, start=FAILING
        ),
    }


PROMPTS = ("import os\n", "def read(path):\n", "class Queue:\n")
LONG: list[dict[str, Any]] = [{"prompt": p, "max_tokens": 40} for p in PROMPTS]


@pytest.fixture(scope="module")
def texts(failing: dict[str, ServerProcess]) -> list[str]:
    return [ask(failing["plain"], COMPLETIONS, **body).text for body in LONG]


@pytest.mark.parametrize("kind", ["plain", "mtp"])
@pytest.mark.parametrize("wrong", [BY_PROCESSOR, BY_SAMPLER, AT_ONCE])
def test_the_others_of_a_batch_go_on_exactly(
    failing: dict[str, ServerProcess],
    texts: list[str],
    kind: str,
    wrong: dict[str, Any],
) -> None:
    def run(body: dict[str, Any]) -> Reply:
        return ask(failing[kind], COMPLETIONS, **body)

    first, *rest = LONG
    with ThreadPoolExecutor(5) as pool:
        good, *bad, last, other = pool.map(
            run, [first, first | wrong, rest[0] | wrong, *rest]
        )
    assert [reply.text for reply in (good, last, other)] == texts
    for reply in bad:
        assert reply.status == 500
        assert "broken on purpose" in reply.last["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "path"), [("plain", CHAT), *(("mtp", path) for path in BODIES)]
)
def test_one_that_is_alone_ends_with_an_error_and_frees_its_row(
    failing: dict[str, ServerProcess], kind: str, path: str
) -> None:
    server = failing[kind]
    for wrong in (BY_PROCESSOR, BY_SAMPLER, AT_ONCE):
        for stream in (True, False):
            reply = ask(server, path, stream=stream, max_tokens=4000, **wrong)
            error = reply.last.get("error") or reply.last["response"]["error"]
            assert "broken on purpose" in error["message"]
    after = ask(server, CHAT)
    assert after.status == 200
    if kind == "mtp":
        # Speculating again, which it would not be if their rows were still there.
        assert assert_counts_add_up(after)[0] > 0


def test_what_was_decoded_before_a_failure_does_not_spoil_the_cache(
    failing: dict[str, ServerProcess],
) -> None:
    body = BODIES[CHAT] | {"max_tokens": 40}
    expected = ask(failing["plain"], CHAT, **body).text
    assert ask(failing["mtp"], CHAT, **body | BY_PROCESSOR).status == 500
    assert ask(failing["mtp"], CHAT, **body).text == expected
