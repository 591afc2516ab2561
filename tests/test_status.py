"""`mlx-optiq-ext status`: the command and its parts."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_optiq_ext import __version__
from mlx_optiq_ext.cli import _backend, _exactness
from mlx_optiq_ext.cli._exactness import MAX_ROWS, num_exact_rows
from mlx_optiq_ext.cli._start_up import START_UP_FILE, Observation, explain, is_hidden
from mlx_optiq_ext.cli.status import render
from mlx_optiq_ext.patches import _table

COMMAND = Path(sys.executable).with_name("mlx-optiq-ext")


def run_status(*options: str, **variables: str) -> str:
    result = subprocess.run(
        [COMMAND, "status", *options],
        cwd="/",
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture
def report() -> dict:
    """What status finds where all is well."""
    return {
        "versions": {"mlx-optiq-ext": "1.0", "mlx": "2.0", "mlx-lm": "3.0"},
        "start_up": {"active": True, "reason": None, "cure": None},
        "patches": {"supported": "mlx-lm>=3", "applied": ["a.b"], "problem": None},
        "backend": {
            "name": "cpu",
            "device": "abacus",
            "row_exact": True,
            "exact_rows": {
                "linear layers, 4-bit": 9,
                "attention, head size 256": 9,
                "recurrence": 9,
            },
            "max_rows": 9,
        },
    }


def test_the_command_reports_this_environment_as_json():
    report = json.loads(run_status("--json"))
    assert report["versions"]["mlx-optiq-ext"] == __version__
    assert report["start_up"] == {"active": True, "reason": None, "cure": None}
    assert report["patches"]["problem"] is None
    assert report["patches"]["applied"] == [row.seam for row in _table.PATCHES]
    assert report["backend"]["name"] == _backend.backend_name()
    assert report["backend"]["device"]


def test_the_command_says_that_the_environment_switches_it_off():
    lines = run_status(MLX_OPTIQ_EXT="0").splitlines()
    assert "start-up hook   not active: MLX_OPTIQ_EXT=0 is set" in lines
    assert "patched         nothing" in lines


def test_a_good_report_reads_in_a_few_lines(report):
    assert render(report).splitlines() == [
        "mlx-optiq-ext   1.0",
        "mlx             2.0",
        "mlx-lm          3.0",
        "start-up hook   active",
        "patched         a.b",
        "backend         cpu (abacus)",
        "row-exact       yes: a row has the same bits alone and among up to 9",
        "measured        linear layers, 4-bit; attention, head size 256; recurrence",
        "MTP heads       kept in the bits of their model; --mtp-bits sets others",
    ]


def test_a_bad_report_says_what_is_wrong_and_what_to_do(report):
    report["versions"]["mlx"] = None
    report["start_up"] = {"active": False, "reason": "no luck", "cure": "try again"}
    report["patches"] = {"supported": "", "applied": [], "problem": "no seam"}
    report["backend"] = {"name": None, "problem": "no library"}
    assert render(report).splitlines() == [
        "mlx-optiq-ext   1.0",
        "mlx             missing",
        "mlx-lm          3.0",
        "start-up hook   not active: no luck",
        "                to do: try again",
        "patched         nothing",
        "problem         no seam",
        "backend         none: no library",
    ]


def test_an_inexact_backend_is_said_to_be_so(report):
    report["backend"]["row_exact"] = False
    report["backend"]["exact_rows"] |= {
        "linear layers, 4-bit": 1,
        "attention, head size 256": 4,
    }
    lines = render(report).splitlines()
    assert lines[-7:-1] == [
        "row-exact       no: a row's bits depend on how many rows are computed at "
        "once,",
        "                so where two tokens are almost equally likely, speculation "
        "may",
        "                choose the other one than plain mlx-lm does",
        "not exact       linear layers, 4-bit: from 2 rows on",
        "                attention, head size 256: from 5 rows on",
        "exact           recurrence: up to 9 rows",
    ]


def observe(folder: Path, **details) -> Observation:
    return Observation(folders=(folder,), package_folder=folder, **details)


def test_s_skips_start_up_files(tmp_path):
    found = explain(observe(tmp_path, options=("-S",)))
    assert found.reason == "Python runs with -S, which skips start-up files"


def test_a_missing_start_up_file_is_named_with_where_it_was_looked_for(tmp_path):
    found = explain(observe(tmp_path))
    assert found.reason == f"{START_UP_FILE} is not installed in {tmp_path}"
    assert "pip install" in found.cure


def test_a_start_up_file_in_a_folder_that_is_only_on_the_path(tmp_path):
    site, target = tmp_path / "site", tmp_path / "target"
    target.mkdir()
    (target / START_UP_FILE).touch()
    found = explain(Observation(folders=(site,), package_folder=target))
    assert found.reason.startswith(f"Python reads no start-up files in {target}")
    assert found.cure == "import mlx_optiq_ext before mlx_lm"


def test_a_start_up_file_of_the_user_when_python_skips_those(tmp_path):
    (tmp_path / START_UP_FILE).touch()
    observation = Observation(folders=(), package_folder=tmp_path, options=("-I", "-s"))
    assert explain(observation).reason.startswith("Python -I -s reads no start-up")


def test_a_start_up_file_that_fails_shows_how(tmp_path):
    (tmp_path / START_UP_FILE).touch()
    found = explain(observe(tmp_path, errors="Error processing line 1\n"))
    assert found.reason.endswith("in vain: Error processing line 1")


def test_the_flag_with_which_macos_hides_a_file():
    assert is_hidden(SimpleNamespace(st_flags=stat.UF_HIDDEN | 1))
    assert not is_hidden(SimpleNamespace(st_flags=1))
    assert not is_hidden(Path(__file__).stat())


def test_a_hidden_start_up_file_comes_with_the_cure(tmp_path):
    path = tmp_path / START_UP_FILE
    path.touch()
    found = explain(observe(tmp_path, hidden=frozenset([path])))
    assert found.reason.startswith(f"macOS marks {path} as hidden")
    assert found.cure == f"chflags -R nohidden {sys.prefix}"


@pytest.mark.parametrize("expected", [1, 4, 9])
def test_rows_that_depend_on_their_number_are_found(expected):
    def layer(rows):
        return rows * (1.0 if rows.shape[1] <= expected else 1.0000001)

    rows = mx.random.normal((1, 9, 16), key=mx.random.key(0))
    alone = [layer(rows[:, i : i + 1]) for i in range(9)]
    found = num_exact_rows(alone, lambda num_rows: layer(rows[:, :num_rows]))
    assert found == expected


def test_the_measurement_covers_all_that_mixes_numbers_in_a_model():
    exact_rows = _exactness.measure_exact_rows()
    assert list(exact_rows) == [
        "linear layers, float32",
        "linear layers, bfloat16",
        "linear layers, 4-bit",
        "attention, head size 256",
        "attention, head size 512",
        "recurrence",
    ]
    assert all(1 <= rows <= MAX_ROWS == 9 for rows in exact_rows.values())


def test_attention_whose_rows_depend_on_their_number_is_found(monkeypatch):
    upstream = mx.fast.scaled_dot_product_attention

    def attention(queries, *args, **kwargs):
        found = upstream(queries, *args, **kwargs)
        is_wide = queries.shape[-1] == 512 and queries.shape[2] > 5
        return found * 1.5 if is_wide else found

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    assert set(_exactness._attention(512)) == {5}
    assert 5 not in _exactness._attention(256)


def test_a_recurrence_whose_rows_depend_on_their_number_is_found(monkeypatch):
    upstream = _exactness.gated_delta_update

    def update(q, *args, **kwargs):
        found, state = upstream(q, *args, **kwargs)
        return (found * 1.5 if q.shape[1] > 2 else found), state

    monkeypatch.setattr(_exactness, "gated_delta_update", update)
    assert _exactness._recurrence() == 2
