"""Compare speculation with plain decoding over the whole grid of exactness.

python scripts/check_grid.py [--part I/N] [PYTEST ...]

The tests check a selection in which every pair of values occurs; this checks every
case, which takes hours. Parts may run one after another or on several machines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests" / "decoding" / "test_grid.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="part I of N (default: all)"
    )
    args, pytest_args = parser.parse_known_args()
    return pytest.main([str(TESTS), "--grid-part", args.part, "-q", *pytest_args])


if __name__ == "__main__":
    sys.exit(main())
