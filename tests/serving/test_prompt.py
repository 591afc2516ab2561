"""Where prompts are split, so that what is kept of them serves the next turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_optiq_ext.serving._prompt import _split


@pytest.fixture(scope="module", params=["plain", "strict"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder: Path = request.getfixturevalue(
        "scripted_folder" if request.param == "plain" else "strict_folder"
    )
    return load_tokenizer(folder)


def split(tokenizer: Any, prompt: str) -> list[str]:
    segments, kinds = _split(tokenizer, tokenizer.encode(prompt))
    assert kinds == ["tool", "assistant"]
    return [tokenizer.decode(segment) for segment in segments]


def test_a_prompt_is_kept_up_to_where_a_thought_begins(tokenizer: Any) -> None:
    for end in ("<think>\n", "<think>\n\n</think>\n\n"):
        assert split(tokenizer, f"a result{end}") == ["a result", end]


def test_a_prompt_without_a_thought_is_kept_but_for_its_last_token(
    tokenizer: Any,
) -> None:
    assert split(tokenizer, "a result") == ["a resul", "t"]
    # Thoughts of earlier turns do not count.
    old = f"<think>x</think>{'y' * 20}"
    assert split(tokenizer, old) == [old[:-1], "y"]


def test_no_part_is_empty(tokenizer: Any) -> None:
    assert split(tokenizer, "ab") == ["a", "b"]
    start = split(tokenizer, "<think>\n")
    assert all(start)
    assert "".join(start) == "<think>\n"
