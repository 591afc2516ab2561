"""What a request is sampled with when it does not say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_optiq_ext.serving._sampling import recommended_by
from tests.helpers import DEMO

from .conftest import ServerProcess, Starter
from .test_speculation import ANTHROPIC, CHAT, COMPLETIONS, ask

# Greedy decoding of this is not that of the demo model.
PENALISED = {"do_sample": False, "temperature": 0.9, "repetition_penalty": 1.5}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 200}


def text_of(server: ServerProcess, path: str, **options: Any) -> str:
    """The text of a reply to a request that leaves the temperature out."""
    event = ask(server, path, **{"temperature": None} | options).last
    if path == ANTHROPIC:
        return "".join(block["text"] for block in event["content"])
    choice = event["choices"][0]
    return choice["text"] if path == COMPLETIONS else choice["message"]["content"]


def copy_with(folder: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def penalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with(tmp_path_factory.mktemp("penalised") / "model", PENALISED)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with(tmp_path_factory.mktemp("sampled") / "model", SAMPLED)


@pytest.fixture(scope="module")
def plain(start_server: Starter, penalised: Path) -> ServerProcess:
    """A server with none of our flags."""
    return start_server(folder=penalised)


PATHS = (COMPLETIONS, CHAT, ANTHROPIC)


@pytest.mark.parametrize("flag", ["--mtp", "--recommended-sampling"])
def test_penalties_and_greedy_decoding_are_what_the_model_recommends(
    start_server: Starter, penalised: Path, plain: ServerProcess, flag: str
) -> None:
    server = start_server(flag, folder=penalised)
    for path in PATHS:
        recommended = text_of(server, path)
        assert recommended == text_of(plain, path, repetition_penalty=1.5)
        own = text_of(server, path, repetition_penalty=0.0)
        assert own == text_of(plain, path) != recommended


def test_a_model_that_is_to_be_sampled_is(start_server: Starter, sampled: Path) -> None:
    server = start_server("--mtp", folder=sampled)
    for path in PATHS:
        assert len({text_of(server, path) for _ in range(4)}) > 1
        assert len({text_of(server, path, temperature=0) for _ in range(3)}) == 1
        # A request's own top_k goes with the recommended temperature.
        assert len({text_of(server, path, top_k=1) for _ in range(3)}) == 1


def test_what_is_recommended_is_said_at_start_up(
    start_server: Starter, sampled: Path, penalised: Path
) -> None:
    def lines(*flags: str, folder: Path = sampled) -> list[str]:
        server = start_server(*flags, folder=folder)
        # Once there is a reply the model is loaded.
        assert text_of(server, COMPLETIONS)
        return [line for line in server.output().splitlines() if "recommends" in line]

    (line,) = lines("--mtp", "--log-level", "WARNING")
    assert "temperature 1.5, top_k 200" in line
    assert "--temp 0" in line
    (line,) = lines("--recommended-sampling", "--top-k", "5")
    assert line.endswith("temperature 1.5; start with --temp 0 for greedy decoding")
    (line,) = lines("--mtp", folder=penalised)
    assert line.endswith("repetition_penalty 1.5")
    assert lines() == lines("--mtp", "--temp", "0") == []


def test_a_recommended_top_k_of_all_tokens_is_no_mistake_of_a_client(
    start_server: Starter, tmp_path: Path
) -> None:
    folder = copy_with(tmp_path / "model", SAMPLED | {"top_k": 10**6})
    server = start_server("--mtp", folder=folder)
    for path in PATHS:
        assert text_of(server, path)
        assert ask(server, path, temperature=1, top_k=10**6).status == 400


@pytest.mark.parametrize("flags", [(), ("--mtp",)])
def test_the_operators_top_k_of_all_tokens_is_no_mistake_of_a_client(
    start_server: Starter, flags: tuple[str, ...]
) -> None:
    server = start_server("--temp", "1", "--top-k", str(10**6), *flags, folder=DEMO)
    for path in PATHS:
        assert len({text_of(server, path) for _ in range(4)}) > 1
        assert ask(server, path, temperature=1, top_k=10**6).status == 400
    server.stop()


def test_a_flag_wins_even_with_the_default_of_mlx_lm(
    start_server: Starter, sampled: Path
) -> None:
    server = start_server("--mtp", "--temp", "0.0", folder=sampled)
    for path in PATHS:
        assert len({text_of(server, path) for _ in range(3)}) == 1


def test_without_our_flags_nothing_is_recommended(
    start_server: Starter, sampled: Path
) -> None:
    server = start_server(folder=sampled)
    for path in PATHS:
        assert len({text_of(server, path) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "top_p": 0.5}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"min_p": 0.1, "presence_penalty": 1.5}, None),
        ({"frequency_penalty": -0.5, "repetition_penalty": 1.1}, None),
        ({"repetition_penalty": 1.0}, {}),
        ({"temperature": None, "top_k": 0.5, "top_p": 7, "min_p": "a"}, {}),
    ],
)
def test_usable_values_are_taken_from_a_generation_config(
    config: dict[str, Any], expected: dict[str, float] | None
) -> None:
    assert recommended_by(config) == (config if expected is None else expected)
