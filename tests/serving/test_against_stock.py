"""A selection of the requests that `scripts/differential_server.py` compares."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from _served import Served
from differential_server import compare, make_request


def test_what_stock_answers_rightly_is_answered_the_same() -> None:
    chance = random.Random(3)
    requests = [make_request(chance) for _ in range(40)]
    with (
        Served("qwen") as served,
        Served("qwen", off=True) as stock,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(lambda each: compare(served, stock, *each), requests))
    assert [problem for problem in found if problem] == []
