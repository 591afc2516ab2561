"""Run the tests against each supported release of mlx-lm.

python scripts/test_versions.py [--python PYTHON] [--version V ...] [-- PYTEST ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from runpy import run_path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Only the file is run, as this interpreter need not have what the package imports.
VERSIONS = run_path(str(ROOT / "mlx_optiq_ext/patches/_versions.py"))["SUPPORTED"]


class Outcome(NamedTuple):
    """The outcome of the tests with one release."""

    version: str
    passed: bool
    seconds: float
    summary: str


def main() -> int:
    args, pytest_args = _parse_args()
    outcomes = [
        run_version(version, args.python, pytest_args)
        for version in args.version or VERSIONS
    ]
    print(f"\n{'mlx-lm':<10}{'result':<10}{'seconds':>7}  summary")
    for version, passed, seconds, summary in outcomes:
        result = "passed" if passed else "FAILED"
        print(f"{version:<10}{result:<10}{seconds:>7.0f}  {summary}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def run_version(version: str, python: str, pytest_args: list[str]) -> Outcome:
    """Install the project with one release of mlx-lm, and test it.

    Args:
        version: The release.
        python: The interpreter to make the virtual environment with.
        pytest_args: More arguments for pytest.
    """
    print(f"\n=== mlx-lm {version}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = _install(version, python, Path(folder))
            passed, summary = _test(environment, pytest_args)
        except subprocess.CalledProcessError as exc:
            passed, summary = False, f"{exc.cmd[-1]}: exit status {exc.returncode}"
    return Outcome(version, passed, time.perf_counter() - start, summary)


def _install(version: str, python: str, folder: Path) -> Path:
    subprocess.run([python, "-m", "venv", folder], check=True)
    environment = folder / "bin" / "python"
    packages = ["-e", f"{ROOT}[cpu,test]", f"mlx-lm=={version}"]
    command = [str(environment), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True)
    return environment


def _test(python: Path, pytest_args: list[str]) -> tuple[bool, str]:
    command = [str(python), "-m", "pytest", *pytest_args]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        line = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
    return process.returncode == 0, line.strip(" =\n")


def _parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Run the tests against each supported release of mlx-lm.",
        epilog="Other arguments go to pytest.",
    )
    parser.add_argument(
        "--version", action="append", help="Only this release (may be repeated)."
    )
    parser.add_argument(
        "--python", default=sys.executable, help="Interpreter for the environments."
    )
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
