"""Adds the option that runs a part of the whole grid of exactness."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid-part",
        metavar="I/N",
        help="run part I of N of the whole grid of exactness, not a covering selection",
    )
