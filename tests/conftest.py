from __future__ import annotations

import warnings

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid-part",
        metavar="I/N",
        help="run part I of N of the whole grid of exactness, not a covering selection",
    )


@pytest.fixture(autouse=True)
def ignore_size_warning() -> None:
    """Every model here is far below the size from which speculation pays."""
    warnings.filterwarnings("ignore", message="Speculation with an MTP head")
