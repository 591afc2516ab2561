"""What `scripts/compare_peers.py` says follows from what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.helpers import DEMO

ROOT = Path(__file__).parents[1]
GREEDY = {"temp": 0.0, "top_p": 0.0, "top_k": 0}
PROMPT = [261, 367, 35, 78]


class Scripts(NamedTuple):
    report: ModuleType
    runner: ModuleType
    environments: ModuleType
    decoder: Any


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from peers import _environments, _report, _runner
        from peers.ours import Ours

        yield Scripts(_report, _runner, _environments, Ours(DEMO, DEMO))


def decode(scripts: Scripts, **options: Any) -> dict[str, Any]:
    request = {"num_draft_tokens": 2, "max_tokens": 30, "sampling": GREEDY} | options
    return scripts.runner.run(
        scripts.decoder, scripts.runner.Request(PROMPT, **request)
    )


def test_a_run_is_its_tokens_its_time_and_its_counts(scripts: Scripts) -> None:
    plain, found = (decode(scripts, num_draft_tokens=n) for n in (0, 2))
    assert found["tokens"] == plain["tokens"]
    assert len(found["tokens"]) == 30
    assert found["seconds"] > 0
    assert found["processor_seconds"] > 0
    assert 30 > found["drafted"] > found["accepted"] > 5
    assert (plain["drafted"], plain["accepted"], plain["cache"]) == (0, 0, None)


@pytest.mark.parametrize("num_draft_tokens", [0, 2])
@pytest.mark.parametrize("stop_after", [None, 11, 12, 13])
def test_the_cache_of_a_decoder_is_looked_into(
    scripts: Scripts, num_draft_tokens: int, stop_after: int | None
) -> None:
    found = decode(
        scripts,
        num_draft_tokens=num_draft_tokens,
        stop_after=stop_after,
        inspects=True,
    )
    assert len(found["tokens"]) == (stop_after or 30)
    assert found["cache"] == {"num_extra": 0, "error": 0.0}


def test_a_cache_with_other_tokens_is_found_out(scripts: Scripts) -> None:
    decoder, inspect = scripts.decoder, scripts.runner.inspect
    tokens = [*PROMPT, 301, 223, 609]

    def look(held: list[int]) -> str:
        cache = decoder.make_cache()
        decoder.logits(held, cache)
        return scripts.report.verdict([inspect(decoder, cache, tokens)])

    assert look(tokens) == "right"
    assert look(tokens[:-1]) == "1 missing"
    assert look([*tokens, 4, 4]) == "2 too many"
    assert look([*tokens[:-1], 610]) == "wrong"


def test_the_worst_of_several_caches_is_said(scripts: Scripts) -> None:
    right, late = {"num_extra": 0, "error": 1e-5}, {"num_extra": -1, "error": 0.0}
    nan = {"num_extra": 0, "error": float("nan")}
    verdict = scripts.report.verdict
    assert verdict([right, right]) == "right"
    assert verdict([right, late]) == "1 missing"
    assert verdict([late, nan, {"num_extra": 2, "error": None}]) == (
        "1 missing; 2 too many; wrong"
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({0: [1, 2, 3], 1: [4, 5, 6]}, "identical"),
        ({0: [1, 2, 3], 1: [4, 5, 7]}, "1 of 2, else from token 2 on"),
        ({0: [0, 2, 3], 1: [4, 5]}, "0 of 2, else from token 0 on"),
    ],
)
def test_outputs_are_compared_with_plain_decoding(
    scripts: Scripts, found: dict[int, list[int]], expected: str
) -> None:
    plain = {0: [1, 2, 3], 1: [4, 5, 6]}
    assert scripts.report.agreement(found, plain) == expected


def reply(seconds: float, tokens: list[int], accepted: int = 0) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "processor_seconds": seconds / 2,
        "tokens": tokens,
        "drafted": 2 * accepted,
        "accepted": accepted,
    }


def test_a_table_has_ratios_of_medians_and_says_what_cannot_run(
    scripts: Scripts,
) -> None:
    report = scripts.report
    contenders = report.contenders([1])
    results = {contender: report.Results() for contender in contenders}
    for contender, found in results.items():
        factor = 2.0 if contender.name == "mlx-optiq-ext, depth 1" else 1.0
        for seconds in (9.0, 2.0, 2.0):  # The first is an outlier.
            found.add_run(0, reply(seconds / factor, [1] * 41, contender[2] * 15))
            found.add_run(1, reply(2 * seconds / factor, [2] * 41, contender[2] * 15))
        for ending in ("limit", "stop"):
            cache = {"cache": {"num_extra": 0, "error": 0.0}}
            found.add_cache(ending, cache)
    results[contenders[-1]].add_run(0, {"error": "ValueError: no such model"})
    lines = report.table(results, is_greedy=True).splitlines()
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {9}
    rest = "identical | right | right |"
    assert lines[2] == f"| mlx-lm, plain | 14 | 1.00x | 35.36 |  | {rest}"
    assert lines[5] == (
        f"| mlx-optiq-ext, depth 1 | 28 | 2.00x | 17.68 | 50.0% | {rest}"
    )
    assert lines[7].startswith(
        "| mlx-optiq, depth 1 | cannot run: ValueError: no such model |"
    )
    assert "| sampled |" in report.table(results, is_greedy=False)


def test_a_process_answers_in_turn_and_says_why_it_cannot(
    scripts: Scripts, tmp_path: Path
) -> None:
    python, process_of = Path(sys.executable), scripts.environments.Process
    process = process_of("ours", python, DEMO, DEMO)
    assert process.error is None
    request = {"num_draft_tokens": 1, "max_tokens": 5, "sampling": GREEDY}
    assert len(process.ask(prompt=PROMPT, **request)["tokens"]) == 5
    assert "error" in process.ask(prompt=PROMPT, nonsense=1)
    assert "nonsense" in process.ask(prompt=PROMPT, **request)["error"]
    process.end()
    assert "FileNotFoundError" in process_of("ours", python, tmp_path, tmp_path).error
