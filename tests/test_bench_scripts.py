"""The benchmark scripts compute their results rightly from what they measure."""

from __future__ import annotations

import bench_assistant
import bench_engine
import bench_lookup
import bench_mtp
import bench_structured
import mlx.core as mx
import pytest
from click.testing import CliRunner
from engine.drafter import DialledDrafter
from engine.measure import Run, allowed_seconds, watching_syncs
from engine.models import PRESETS, Preset, Weights, make_drafter, make_model

from mlx_optiq_ext import SpeculationStats

TINY = {
    "qwen": Preset(
        "qwen",
        PRESETS["qwen-60m"].config
        | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
        | {"vocab_size": 512},
    ),
    "gemma": Preset(
        "gemma",
        PRESETS["gemma-40m"].config
        | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 512},
        PRESETS["gemma-40m"].assistant | {"vocab_size": 512},
    ),
}


def test_allowed_time_counts_every_round_with_its_own_depth():
    stats = SpeculationStats(
        num_target_calls=8,
        num_rounds=6,
        num_drafted_per_position=[6, 5],
        num_accepted_per_position=[4, 1],
    )
    run = Run([0] * 13, 1.0, stats)
    assert run.rounds_by_depth == {0: 1, 1: 1, 2: 5}
    verify, draft = {1: 1.0, 2: 1.5, 3: 2.0}, {0: 0.0, 1: 0.1, 2: 0.2}
    assert allowed_seconds(run, verify, draft) == pytest.approx(1 + 1.6 + 5 * 2.2)


def test_syncs_are_counted_while_they_are_watched():
    with watching_syncs() as host:
        mx.array([1, 2]).tolist()
        mx.eval(mx.array(1) + 1)
        assert mx.array(3).item() == 3
    mx.array([1, 2]).tolist()
    assert host.num_syncs == 3
    assert 0 < host.blocked_seconds < host.seconds


@pytest.mark.parametrize("family", ["qwen", "gemma"])
@pytest.mark.parametrize("draft", ["none", "real"])
def test_a_random_model_accepts_what_is_dialled(family, draft):
    preset, weights = TINY[family], Weights(mx.float32, 4)
    model = make_model(preset, weights)
    drafter = make_drafter(preset, model, weights) if draft == "real" else None
    prompt = mx.arange(1, 9)
    start = bench_engine.Start(
        model, bench_engine.filled_cache(model, prompt), prompt, lambda: 0.0
    )
    plain = bench_engine.run_plain(start, 20)
    for acceptance in (0.0, 1.0):
        dialled = DialledDrafter(plain.tokens, 512, acceptance, drafter)
        run = bench_engine.run_speculative(start, 20, dialled, 3)
        assert run.tokens == plain.tokens
        assert run.stats.acceptance_rate == acceptance


@pytest.mark.parametrize(
    ("main", "arguments", "expected"),
    [
        (
            bench_mtp.main,
            ["--repeats", "1", "--sampling", "greedy"],
            "| demo_model |",
        ),
        (bench_lookup.main, ["--demo", "--repeats", "1"], "| free prose |"),
        (bench_assistant.main, ["--repeats", "1", "--max-gamma", "1"], "| reasoning |"),
        (
            bench_structured.main,
            ["--repeats", "1", "--num-draft-tokens", "1"],
            "| any JSON |",
        ),
    ],
)
def test_a_script_writes_what_it_prints(main, arguments, expected, tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("markdown", "json")}
    paths = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    result = CliRunner().invoke(
        main, ["--tokens", "8", *arguments, *paths], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert expected in result.stdout
    assert files["markdown"].read_text() in result.stdout
    assert files["json"].read_text().startswith("{")


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from _benchmarks import plot_bars, plot_line

    plot_bars(tmp_path / "bars.png", {"a": 1.2, "b": 0.9}, "title")
    plot_line(tmp_path / "line.png", {0: 1.0, 1: 1.3}, "x", "y")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
