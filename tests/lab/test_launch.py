"""The settings of the page become a command line, or an error that names a setting."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from typing import Any

import pytest

from mlx_optiq_ext.lab._flags import OWN, Flag, ask_for_flags
from mlx_optiq_ext.lab._launch import Launch, read_launch
from mlx_optiq_ext.lab._models import find_models

MODELS = find_models()
FLAGS = {
    "--prefill-step-size": Flag("--prefill-step-size", "N", (), ""),
    "--turbo": Flag("--turbo", None, (), ""),
    "--prompt-lookup": Flag("--prompt-lookup", None, (), ""),
    "--kv-bits": Flag("--kv-bits", "{4,8}", ("4", "8"), ""),
}
QWEN = MODELS["demo/qwen"].source


def read(**settings: Any) -> Launch:
    return read_launch({"model": "demo/qwen"} | settings, MODELS, FLAGS)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, []),
        ({"mtp": True}, ["--mtp"]),
        ({"mtp": True, "num_draft_tokens": "auto"}, ["--mtp"]),
        (
            {"mtp": True, "num_draft_tokens": 3},
            ["--mtp", "--num-draft-tokens", "3"],
        ),
        ({"mtp": True, "draft_vocab": 512}, ["--mtp", "--draft-vocab", "512"]),
        (
            {"num_draft_tokens": 3, "flags": {"--prompt-lookup": True}},
            ["--num-draft-tokens", "3", "--prompt-lookup"],
        ),
        # Without a drafter these mean nothing.
        ({"num_draft_tokens": 3, "draft_vocab": 512}, []),
        ({"recommended": True}, ["--recommended-sampling"]),
        ({"mtp": True, "recommended": True}, ["--mtp"]),
        (
            {"sampling": {"temperature": 0.5, "top_k": 20, "min_p": None}},
            ["--temp", "0.5", "--top-k", "20"],
        ),
        (
            {"flags": {"--prefill-step-size": "512", "--turbo": True}},
            ["--prefill-step-size", "512", "--turbo"],
        ),
        ({"flags": {"--kv-bits": "4", "--turbo": False}}, ["--kv-bits", "4"]),
    ],
)
def test_settings_become_a_command_line(settings, arguments):
    command = read(**settings).command
    expected = ["mlx_lm.server", "--model", QWEN, *arguments, "--port", "8080"]
    assert command == [*expected, "--allowed-origins", "http://127.0.0.1:8080"]


def test_another_drafter_is_named_by_its_source():
    launch = read_launch(
        {"model": "demo/gemma", "drafter": "demo/gemma-assistant"}, MODELS, FLAGS
    )
    assert launch.command[3:5] == ["--draft", MODELS["demo/gemma-assistant"].source]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "/etc"}, "not in the list"),
        ({"model": "../demo_model"}, "not in the list"),
        ({"model": ["demo/qwen"]}, "not in the list"),
        ({"model": "demo/gemma-assistant"}, "is a drafter"),
        ({"drafter": "/etc/passwd"}, "not in the list"),
        ({"mtp": True, "drafter": "demo/gemma"}, "exclude each other"),
        ({"mtp": True, "num_draft_tokens": 9}, "from 1 to 8"),
        ({"mtp": True, "num_draft_tokens": True}, "from 1 to 8"),
        ({"mtp": True, "draft_vocab": "/etc/passwd"}, "a whole number"),
        ({"drafter": "demo/gemma-assistant", "draft_vocab": 9}, "only an MTP head"),
        ({"sampling": {"temperature": float("nan")}}, "a number"),
        ({"sampling": {"top_p": 1.1}}, "from 0.0 to 1.0"),
        ({"sampling": [1]}, "expected an object"),
        ({"port": 80}, "from 1024"),
        ({"port": "8080"}, "a whole number"),
        ({"origins": "/etc/passwd"}, "expected addresses"),
        ({"origins": "http://a.example,--mtp"}, "expected addresses"),
        ({"origins": ["*"]}, "expected addresses"),
        ({"api_key": "a b"}, "visible ASCII"),
        ({"flags": {"--adapter-path": "1"}}, "cannot be set"),
        ({"flags": {"--prefill-step-size": "/etc"}}, "expected a number"),
        ({"flags": {"--kv-bits": "5"}}, "expected 4, 8"),
        ({"flags": {"--turbo": "yes"}}, "true or false"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        read(**settings)


@pytest.mark.parametrize("settings", [None, [], "demo/qwen", 3])
def test_settings_are_an_object(settings):
    with pytest.raises(ValueError, match="expected an object"):
        read_launch(settings, MODELS, FLAGS)


def test_a_shell_takes_the_command_line_as_it_is_shown(monkeypatch):
    launch = read(mtp=True, api_key="it's$HOME")
    shown = launch.shell_command
    assert QWEN not in shown
    # The demo models are named by a command that prints their folder.
    printed = (
        f"mlx-optiq-ext() {{ echo {shlex.quote(QWEN)}; }}; "
        f"mlx_lm.server() {{ echo $MLX_OPTIQ_EXT_API_KEY mlx_lm.server; "
        f"printf '%s\\n' \"$@\"; }}; {shown}"
    )
    found = subprocess.check_output(["bash", "-c", printed], text=True).splitlines()
    assert found == ["it's$HOME mlx_lm.server", *launch.command[1:]]


@pytest.mark.parametrize("origins", ["*", "http://localhost:3000,https://a.example"])
def test_web_pages_may_ask_the_server_if_that_is_wanted(origins):
    command = read(origins=origins).command
    assert command[-2:] == ["--allowed-origins", origins]


def test_the_flags_come_from_the_help_of_the_server():
    flags = asyncio.run(ask_for_flags())
    assert "--prompt-cache-size" in flags
    assert flags["--kv-bits"].value == "KV_BITS"
    assert "--max-tokens" in flags
    assert flags["--prompt-lookup"].value is None
    assert not OWN & set(flags)
    # What names files cannot be set from a page.
    assert not {"--adapter-path", "--chat-template", "--log-level"} & set(flags)
