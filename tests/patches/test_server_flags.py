"""Flags of ``mlx_lm.server`` whose values no request could be served with."""

from __future__ import annotations

import pytest

from tests.helpers import DEMO
from tests.processes import run_command

MODEL = ("--model", str(DEMO))
WRONG = [
    ("--temp", "-1", "at least 0"),
    ("--temp", "nan", "at least 0"),
    ("--temp", "inf", "at least 0"),
    ("--top-p", "7", "0 to 1"),
    ("--top-p", "-0.5", "0 to 1"),
    ("--min-p", "1.5", "0 to 1"),
    ("--top-k", "-1", "at least 0"),
    ("--max-tokens", "0", "at least 1"),
    ("--max-tokens", "-5", "at least 1"),
    ("--decode-concurrency", "0", "at least 1"),
    ("--prompt-concurrency", "-3", "at least 1"),
    ("--prefill-step-size", "0", "at least 1"),
    ("--prompt-cache-size", "-1", "at least 0"),
    ("--quantized-kv-start", "-1", "at least 0"),
    ("--kv-bits", "7", "one of 2, 3, 4, 5, 6, 8"),
    ("--kv-group-size", "33", "one of 32, 64, 128"),
    ("--chat-template-args", "[1]", "a JSON object"),
    ("--num-draft-tokens", "0", "from 1 to 8"),
    ("--num-draft-tokens", "-1", "from 1 to 8"),
    ("--num-draft-tokens", "9999", "from 1 to 8"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), WRONG)
def test_a_value_that_no_request_can_be_served_with_is_a_usage_error(
    flag: str, value: str, expected: str
) -> None:
    code, _, error = run_command("server", *MODEL, "--mtp", f"{flag}={value}")
    assert code == 2
    line = error.splitlines()[-1]
    assert f"error: argument {flag}: " in line
    assert expected in line
    assert value in line or flag == "--chat-template-args"


@pytest.mark.parametrize("flag", ["--prompt-lookup", "--recommended-sampling"])
def test_values_are_checked_with_any_flag_that_changes_decoding(flag: str) -> None:
    code, _, error = run_command("server", *MODEL, flag, "--top-p", "7")
    assert code == 2
    assert "argument --top-p: expected 0 to 1, got 7.0" in error


@pytest.mark.parametrize("port", ["65536", "99999", "-1"])
@pytest.mark.parametrize("flags", [(), ("--mtp",)])
def test_a_port_that_there_is_none_of_is_a_usage_error(
    flags: tuple[str, ...], port: str
) -> None:
    code, _, error = run_command("server", *MODEL, f"--port={port}", *flags)
    assert code == 2
    expected = f"error: argument --port: expected 0 to 65535, got {port}"
    assert error.splitlines()[-1].endswith(expected)


@pytest.mark.parametrize("size", ["lots", "-5", "5KB", ""])
def test_a_size_that_is_none_is_a_usage_error(size: str) -> None:
    code, _, error = run_command("server", *MODEL, f"--prompt-cache-bytes={size}")
    assert code == 2
    assert f"expected a size like 4GB, got {size!r}" in error.splitlines()[-1]
