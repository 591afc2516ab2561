"""Copies of the context in a served model: the same replies, and what is said of it."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.helpers import CODE, CODE_AGAIN, DEMO

from .conftest import ServerProcess, Starter

SOURCES = {"alone": {"prompt_lookup"}, "with a head": {"prompt_lookup", "mtp"}}


@pytest.fixture(scope="module")
def plain(start_server: Starter) -> ServerProcess:
    return start_server("--temp", "0", folder=DEMO)


@pytest.fixture(scope="module", params=SOURCES)
def server(request: Any, start_server: Starter) -> ServerProcess:
    flags = ("--mtp",) if request.param == "with a head" else ()
    found = start_server("--prompt-lookup", "--temp", "0", *flags, folder=DEMO)
    found.sources = SOURCES[request.param]
    return found


def ask(server: ServerProcess, **options: Any) -> Any:
    body = {"prompt": CODE_AGAIN, "max_tokens": 40, "temperature": 0} | options
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())
    finally:
        connection.close()


def text_of(reply: Any) -> str:
    return reply["choices"][0]["text"]


def test_a_reply_is_that_of_a_plain_server(
    server: ServerProcess, plain: ServerProcess
) -> None:
    reply = ask(server, num_draft_tokens=4, token_sources=True)
    assert text_of(reply) == text_of(ask(plain))
    drafted = reply["timings"]["draft_n_per_source"]
    accepted = reply["timings"]["draft_n_accepted_per_source"]
    assert accepted["prompt_lookup"] > 0
    assert drafted.keys() <= server.sources
    assert sum(drafted.values()) == reply["timings"]["draft_n"]
    pieces = reply["token_sources"]
    sources = [piece["source"] for piece in pieces]
    assert sources.count("prompt_lookup") == accepted["prompt_lookup"]


def test_a_request_turns_copies_off(server: ServerProcess) -> None:
    expected = text_of(ask(server))
    for number in ({}, {"num_draft_tokens": 4}, {"seed": 3}):
        reply = ask(server, prompt_lookup=False, **number)
        assert text_of(reply) == expected
        found = reply["timings"]["draft_n_per_source"]
        assert found.keys() <= server.sources - {"prompt_lookup"}
    with pytest.raises(AssertionError):
        ask(server, prompt_lookup="no")


def test_requests_that_come_together_are_answered_as_alone(
    server: ServerProcess, plain: ServerProcess
) -> None:
    bodies = [
        {"prompt": CODE_AGAIN[: 150 + 20 * number], "max_tokens": 16 + 8 * number}
        for number in range(5)
    ]
    bodies[3]["prompt_lookup"] = False
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda body: ask(server, **body), bodies))
    for reply, body in zip(found, bodies, strict=True):
        assert text_of(reply) == text_of(ask(plain, **body))
    assert "prompt_lookup" not in found[3]["timings"]["draft_n_per_source"]


def test_metrics_count_each_source(server: ServerProcess) -> None:
    reply = ask(server, num_draft_tokens=2)
    accepted = reply["timings"]["draft_n_accepted_per_source"]["prompt_lookup"]
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    name = "spec_decode_num_accepted_tokens_per_source_total"
    found = re.search(name + r'{source="prompt_lookup"} ([\d.]+)', text)
    assert found is not None
    assert float(found[1]) >= accepted > 0


def test_a_second_turn_goes_on_from_the_first(server: ServerProcess) -> None:
    first = ask(server, max_tokens=20)
    prompt = CODE_AGAIN + text_of(first) + "\n" + CODE[:60]
    replies = [ask(server, prompt=prompt, num_draft_tokens=4) for _ in range(2)]
    assert text_of(replies[0]) == text_of(replies[1])
    assert replies[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    for reply in replies:
        assert reply["timings"]["draft_n_accepted_per_source"]["prompt_lookup"] > 0
