"""What pages are told, and that they are told all of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from mlx_optiq_ext.lab._feed import MAX_PENDING, Feed, encode
from mlx_optiq_ext.lab._log import MAX_CHARACTERS, Log


def read(event: bytes) -> tuple[str, Any]:
    name, data, *_ = event.decode().splitlines()
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_what_changes_before_a_page_listens_is_in_what_it_is_told_first():
    async def test() -> None:
        feed = Feed()
        state = ["stopped"]
        stream = feed.stream(lambda: [("state", state[0])])
        state[0] = "ready"
        feed.publish("state", "ready")
        assert read(await anext(stream)) == ("state", "ready")
        await stream.aclose()

    asyncio.run(test())


def test_a_page_that_is_far_behind_is_let_go():
    async def test() -> None:
        feed = Feed()
        stream = feed.stream(lambda: [("state", "ready")])
        await anext(stream)
        for number in range(MAX_PENDING + 10):
            feed.publish("log", number)
        told = [read(event)[1] async for event in stream]
        assert told == list(range(MAX_PENDING))

    asyncio.run(test())


def test_numbers_that_json_does_not_have_are_told_as_null():
    data = {"speed": float("nan"), "list": [float("inf"), 1.5]}
    assert read(encode("sample", data)) == (
        "sample",
        {"speed": None, "list": [None, 1.5]},
    )


def test_a_line_of_any_length_is_kept_in_part():
    log = Log()
    line = log.add("x" * 100_000)
    assert line is not None
    assert len(line["text"]) <= MAX_CHARACTERS + 1
    assert line["text"].endswith("…")
