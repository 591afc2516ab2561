"""Fresh interpreters: when mlx-lm is patched, and what the hook costs.

The tests need an installation of this project, `pip install -e ".[cpu,test]"`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import DEMO

ROOT = Path(__file__).parents[1]
COMMAND_LINES = ("generate", "chat", "server", "benchmark", "cache_prompt")

IS_ARMED = """
import sys
modules = [type(entry).__module__ for entry in sys.meta_path]
print(modules.count("mlx_optiq_ext._bootstrap"))
"""
IS_PATCHED = "print(type(mlx_lm.stream_generate).__name__)"

PROBE = """
def announce(wrapped, instance, args, kwargs):
    print("patched", wrapped.__module__, wrapped.__qualname__, flush=True)
    return wrapped(*args, **kwargs)
"""
# Python imports a module of this name at start-up, after the start-up files.
SITE_CUSTOMIZE = """
from mlx_optiq_ext.patches import _table
_table.PATCHES = tuple(_table.Patch(*seam, "probe:announce") for seam in {seams!r})
"""


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )


def output_of(code: str, *options: str, **variables: str) -> str:
    result = run_python(*options, "-c", code, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def with_seams(tmp_path):
    """Make the patch table of fresh interpreters wrap other seams."""

    def write(*seams: tuple[str, str]) -> str:
        (tmp_path / "probe.py").write_text(PROBE)
        text = SITE_CUSTOMIZE.format(seams=seams)
        (tmp_path / "sitecustomize.py").write_text(text)
        return str(tmp_path)

    return write


@pytest.fixture
def without_start_up() -> str:
    """A PYTHONPATH with which `python -S` finds all that is installed."""
    return os.pathsep.join([str(ROOT), *filter(None, sys.path)])


def test_the_hook_is_there_once():
    assert output_of(IS_ARMED) == "1"


def test_the_hook_is_there_once_after_an_import_of_the_package():
    assert output_of(f"import mlx_optiq_ext\n{IS_ARMED}") == "1"


def test_the_environment_switches_the_hook_off():
    assert output_of(IS_ARMED, MLX_OPTIQ_EXT="0") == "0"
    assert output_of(IS_ARMED, MLX_OPTIQ_EXT="1") == "1"


def test_without_start_up_files_the_package_arms_the_hook(without_start_up):
    for code, expected in ((IS_ARMED, "0"), (f"import mlx_optiq_ext\n{IS_ARMED}", "1")):
        assert output_of(code, "-S", PYTHONPATH=without_start_up) == expected


def test_an_interpreter_that_does_not_use_mlx_lm_imports_next_to_nothing(
    without_start_up,
):
    code = """
import os, sys
before = set(sys.modules)
import mlx_optiq_ext._bootstrap
mlx_optiq_ext._bootstrap.install()
print(*sorted(set(sys.modules) - before))
"""
    imported = output_of(code, "-S", PYTHONPATH=without_start_up)
    assert imported.split() == ["mlx_optiq_ext", "mlx_optiq_ext._bootstrap"]


def test_each_row_of_the_table_is_in_place_without_a_line_of_code():
    code = """
import sys, mlx_lm
from mlx_optiq_ext import is_enabled, patches
from mlx_optiq_ext.patches import _table
for name in patches.target_modules():
    __import__(name)
assert is_enabled()
assert patches.problem() is None
assert sorted(patches.applied()) == sorted(_table.PATCHES)
"""
    result = run_python("-W", "error::RuntimeWarning", "-c", code)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_environment_leaves_mlx_lm_alone():
    assert output_of(f"import mlx_lm; {IS_PATCHED}", MLX_OPTIQ_EXT="0") == "function"


def test_the_package_patches_an_mlx_lm_that_is_already_imported(without_start_up):
    code = """
import mlx_lm.server, sys
assert not any("optiq" in name or name == "wrapt" for name in sys.modules)
original = mlx_lm.stream_generate
import mlx_optiq_ext
from mlx_optiq_ext import patches
assert patches.problem() is None
seam = sys.modules["mlx_lm.generate"].stream_generate
assert seam is not original and seam.__wrapped__ is original
assert mlx_lm.stream_generate is mlx_lm.server.stream_generate is seam
import mlx_lm.chat
assert mlx_lm.chat.stream_generate is seam
"""
    output_of(code, "-S", PYTHONPATH=without_start_up)


def test_the_switch_reaches_names_that_were_copied_while_patched(with_seams):
    code = """
from mlx_lm.chat import setup_arg_parser
import mlx_optiq_ext
for switch in (mlx_optiq_ext.disable, mlx_optiq_ext.enable):
    switch()
    print(mlx_optiq_ext.is_enabled())
    setup_arg_parser()
"""
    folder = with_seams(("mlx_lm.chat", "setup_arg_parser"))
    assert output_of(code, PYTHONPATH=folder).splitlines() == [
        "False",
        "True",
        "patched mlx_lm.chat setup_arg_parser",
    ]


def test_an_unsupported_mlx_lm_is_left_alone_with_one_warning(tmp_path):
    folder = tmp_path / "mlx_lm-0.99.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: mlx-lm\nVersion: 0.99.0\n")
    code = f"""
import mlx_lm, mlx_lm.chat, mlx_optiq_ext
{IS_PATCHED}
print(mlx_optiq_ext.is_enabled())
mlx_optiq_ext.enable()
"""
    result = run_python("-c", code, PYTHONPATH=str(tmp_path))
    reason = "mlx-lm 0.99.0 is installed, supported are 0.32.0, 0.32.1 and 0.32.2"
    assert result.stdout.split() == ["function", "False"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert f"RuntimeWarning: mlx-optiq-ext leaves mlx-lm as it is: {reason}" in (
        result.stderr
    )
    assert result.stderr.endswith(f"SpeculationError: cannot patch mlx-lm: {reason}\n")


def test_a_missing_seam_leaves_mlx_lm_alone_with_one_warning(with_seams):
    folder = with_seams(
        ("mlx_lm.utils", "load_model"), ("mlx_lm.generate", "dream_generate")
    )
    code = f"""
import mlx_lm, mlx_lm.utils, mlx_lm.chat
{IS_PATCHED}
print(type(mlx_lm.utils.load_model).__name__)
"""
    result = run_python("-c", code, PYTHONPATH=folder)
    assert result.stdout.split() == ["function", "function"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert "it has no mlx_lm.generate.dream_generate" in result.stderr


def test_enable_raises_where_an_import_would_warn(with_seams):
    folder = with_seams(("mlx_lm.generate", "dream_generate"))
    result = run_python(
        "-c", "import mlx_optiq_ext; mlx_optiq_ext.enable()", PYTHONPATH=folder
    )
    assert "RuntimeWarning" not in result.stderr
    reason = "it has no mlx_lm.generate.dream_generate"
    assert result.stderr.endswith(f"SpeculationError: cannot patch mlx-lm: {reason}\n")


def test_enable_does_not_overrule_the_environment():
    code = "import mlx_optiq_ext; mlx_optiq_ext.enable()"
    result = run_python("-c", code, MLX_OPTIQ_EXT="0")
    assert "SpeculationError: cannot patch mlx-lm: MLX_OPTIQ_EXT=0" in result.stderr


def test_a_broken_applier_does_not_break_mlx_lm(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise OSError('broken')\n")
    code = f"import mlx_lm; {IS_PATCHED}"
    result = run_python("-c", code, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "function"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "OSError: broken" in result.stderr


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_module_run_with_m_runs_its_patched_main(name, with_seams):
    folder = with_seams(*((f"mlx_lm.{command}", "main") for command in COMMAND_LINES))
    patched = run_python("-m", f"mlx_lm.{name}", "--help", PYTHONPATH=folder)
    plain = run_python("-m", f"mlx_lm.{name}", "--help", MLX_OPTIQ_EXT="0")
    announcement = f"patched mlx_lm.{name} main\n"
    assert plain.returncode == 0
    assert patched.stdout.count(announcement) == 1
    assert patched.stdout.replace(announcement, "") == plain.stdout
    assert patched.stderr == plain.stderr


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-um", "mlx_lm.chat"],
        [sys.executable, "-mmlx_lm.chat"],
        [sys.executable, "-m", "mlx_lm", "chat"],
        [Path(sys.executable).with_name("mlx_lm.chat")],
    ],
)
def test_the_other_ways_to_start_a_command_run_its_patched_main(command, with_seams):
    environment = {**os.environ, "PYTHONPATH": with_seams(("mlx_lm.chat", "main"))}
    result = subprocess.run(
        [*command, "--help"], cwd="/", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stdout.count("patched mlx_lm.chat main\n") == 1


# Python stays here while it imports mlx-lm, which imports the module of that name.
SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "transformers":
            print("importing", flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Slow())
"""
PROGRAMS = Path(sys.executable).parent
SERVER_COMMANDS = [
    [PROGRAMS / "mlx_lm.server"],
    [PROGRAMS / "mlx_lm", "server"],
    [sys.executable, "-m", "mlx_lm.server"],
    [sys.executable, "-m", "mlx_lm", "server"],
]


def interrupt_while_importing(
    command: list[str | Path], folder: Path, **variables: str
) -> tuple[int, str]:
    """Exit code and standard error of a command that gets Ctrl-C amid its imports."""
    (folder / "sitecustomize.py").write_text(SLOW_IMPORT)
    process = subprocess.Popen(
        command,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(folder), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests may run where the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while process.stdout.readline() != "importing\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    return process.returncode, error


@pytest.mark.parametrize("command", SERVER_COMMANDS)
def test_an_interrupt_while_the_server_is_imported_is_one_line(command, tmp_path):
    command = [*command, "--model", "x", "--mtp"]
    assert interrupt_while_importing(command, tmp_path) == (130, "Stopped.\n")


def test_an_interrupt_while_a_command_of_ours_imports_mlx_lm_is_one_line(tmp_path):
    command = [PROGRAMS / "mlx-optiq-ext", "doctor", DEMO]
    assert interrupt_while_importing(command, tmp_path) == (130, "Stopped.\n")


@pytest.mark.parametrize(
    ("program", "variables"),
    [("mlx_lm.generate", {}), ("mlx_lm.server", {"MLX_OPTIQ_EXT": "0"})],
)
def test_an_interrupt_of_other_imports_is_left_to_python(program, variables, tmp_path):
    command = [PROGRAMS / program, "--help"]
    code, error = interrupt_while_importing(command, tmp_path, **variables)
    assert code == -signal.SIGINT
    assert error.endswith("KeyboardInterrupt\n")


def test_an_mlx_lm_that_is_left_alone_gets_its_interrupts_back(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise OSError('broken')\n")
    command = [PROGRAMS / "mlx_lm.server", "--help"]
    code, error = interrupt_while_importing(command, tmp_path)
    assert code == -signal.SIGINT
    assert error.endswith("KeyboardInterrupt\n")


def test_other_modules_run_with_m_are_not_redirected(with_seams):
    folder = with_seams(("mlx_lm.chat", "main"))
    result = run_python("-m", "mlx_lm", "--version", PYTHONPATH=folder)
    assert result.returncode == 0
    assert "patched" not in result.stdout
