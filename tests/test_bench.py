"""`mlx-optiq-ext bench`, and what it and the scripts measure with."""

from __future__ import annotations

import importlib
import json

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_optiq_ext import SpeculationStats, _comparing, _costs
from mlx_optiq_ext._comparing import Comparison, Difference
from mlx_optiq_ext.cli import main
from mlx_optiq_ext.cli._machine import loaded_libraries
from tests.helpers import DEMO, contents, load_tiny

# `from mlx_optiq_ext.cli import bench` is the command and not its module.
command = importlib.import_module("mlx_optiq_ext.cli.bench")
QUICK = ("bench", "--model", str(DEMO), "--max-depth", "1", "--tokens", "12")


def stats(num_drafted: int, num_accepted: int) -> SpeculationStats:
    return SpeculationStats(
        num_rounds=num_drafted,
        num_drafted_per_position=[num_drafted],
        num_accepted_per_position=[num_accepted],
    )


def test_the_report_has_costs_speeds_acceptance_and_the_best_depth():
    report = json.loads(CliRunner().invoke(main, [*QUICK, "--json"]).stdout)
    assert report["verify_cost"]["1"] == 1
    assert report["verify_cost"]["2"] > 0
    (found,) = report["depths"].values()
    assert found["speed_up"] > 0
    assert 0 < found["acceptance_rate"] <= 1
    assert len(found["acceptance_rate_by_prompt"]) == 5
    assert found["differences"] == {}
    assert report["best_depth"] == int(found["speed_up"] > 1)


def test_a_program_can_follow_how_far_it_is():
    result = CliRunner().invoke(main, [*QUICK, "--json"])
    lines = result.stderr.splitlines()
    assert [line for line in lines if " of 5)" in line] == [
        f"Decoding {name} ({number} of 5)"
        for number, name in enumerate(_comparing.PROMPTS, start=1)
    ]


def test_contradicting_drafters_are_refused():
    result = CliRunner().invoke(main, [*QUICK, "--mtp", "a", "--draft", "b"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_a_model_without_a_head_is_one_line_of_error(tmp_path):
    result = CliRunner().invoke(main, [*QUICK, "--mtp", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: ")


def test_long_texts_weigh_more_than_short_ones():
    found = command.summarize(
        {
            "long": Comparison(90, 10.0, 20.0, stats(50, 40), None),
            "short": Comparison(10, 10.0, 5.0, stats(10, 0), Difference(3, 1e-4)),
        }
    )
    assert found["plain_tps"] == pytest.approx(10)
    assert found["speed_up"] == pytest.approx(10 / (4.5 + 2))
    assert found["acceptance_rate"] == pytest.approx(40 / 60)
    assert found["differences"] == {"short": {"position": 3, "margin": 1e-4}}


@pytest.mark.parametrize(("tps", "expected"), [(0.1, 16), (50.0, 50), (1000.0, 128)])
def test_answers_are_as_long_as_half_a_minute_allows(tps, expected):
    assert command.affordable_tokens(tps, 25) == expected


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_measuring_passes_leaves_the_cache_as_it_was(kind):
    model, tokens = load_tiny(kind), mx.arange(1, 21)
    cache = _costs.filled_cache(model, tokens)
    before = [[x + 0 for x in contents(entry)] for entry in cache]
    seconds = _costs.measure_verify_seconds(model, cache, tokens, [1, 3], 2)
    assert list(seconds) == [1, 3]
    assert min(seconds.values()) > 0
    for expected, entry in zip(before, cache, strict=True):
        pairs = zip(expected, contents(entry), strict=True)
        assert all(mx.array_equal(a, b).item() for a, b in pairs)


def test_libraries_are_read_from_the_maps_of_a_process():
    maps = (
        "5586-5587 r--p 00000000 fe:00 260104   /usr/bin/python\n"
        "5587-5588 r-xp 00001000 fe:00 260104   /usr/bin/python\n"
        "7f00-7f01 rw-p 00000000 00:00 0 \n"
        "7f02-7f03 r-xp 00001000 fe:00 260105   /opt/a folder/libopenblas.so.0\n"
    )
    assert loaded_libraries(maps) == ["python", "libopenblas.so.0"]
