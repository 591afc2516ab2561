"""Compare speculation with plain decoding over the whole grids of exactness.

python scripts/check_grid.py [--grid alone|company] [--part I/N] [PYTEST ...]

One grid is of sequences alone, the other of several that come and go. The tests check a
selection in which every pair of values occurs; this checks every case, which takes
hours. Parts may run one after another or on several machines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests" / "decoding"
FILES = {"alone": "test_grid.py", "company": "test_company.py"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="part I of N (default: all)"
    )
    parser.add_argument("--grid", choices=FILES, default="alone")
    args, pytest_args = parser.parse_known_args()
    tests = str(TESTS / FILES[args.grid])
    return pytest.main([tests, "--grid-part", args.part, "-q", *pytest_args])


if __name__ == "__main__":
    sys.exit(main())
