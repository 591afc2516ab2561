"""What the README shows works as it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from mlx_optiq_ext.drafters import REGISTRY
from tests.helpers import DEMO

README = (Path(__file__).parents[1] / "README.md").read_text()


def block_with(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    return block


def test_a_drafter_is_added_with_a_class_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"mx": mx}
    exec(block_with("class RepeatDrafter"), names)
    monkeypatch.setitem(REGISTRY, "repeat", names["RepeatDrafter"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "repeat"}))
    model, tokenizer = mlx_lm.load(str(DEMO))
    plain = mlx_lm.generate(model, tokenizer, "class Queue:\n", max_tokens=40)
    *_, last = mlx_lm.stream_generate(
        model,
        tokenizer,
        "class Queue:\n",
        max_tokens=40,
        draft=str(tmp_path),
        num_draft_tokens=1,
    )
    assert last.speculation.num_drafted > 30
    assert plain == mlx_lm.generate(
        model, tokenizer, "class Queue:\n", max_tokens=40, draft=tmp_path
    )


def test_statistics_are_on_the_last_response(capsys: Any) -> None:
    code = block_with("response.speculation").replace("Qwen/Qwen3.5-9B", str(DEMO))
    exec(code, {})
    rates = capsys.readouterr().out.split()[-2:]
    assert 0 <= float(rates[0]) <= 1 <= float(rates[1])


def test_the_published_snippet_runs(capsys: Any) -> None:
    gemma = DEMO.parent / "demo_gemma"
    names = {"path": gemma, "assistant_path": gemma / "assistant"}
    exec(block_with("spec_generate"), names)
    assert len(capsys.readouterr().out) > 100


def test_every_script_is_listed() -> None:
    scripts = Path(__file__).parents[1] / "scripts"
    names = {file.name for file in scripts.glob("[a-z]*.py")} - {"startup.py"}
    assert {name for name in names if f"scripts/{name}" in README} == names
