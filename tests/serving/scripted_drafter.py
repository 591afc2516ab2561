"""A drafter that knows what the scripted model will say, and is wrong now and then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.drafters import Proposal

from .conftest import START
from .scripted_model import next_token

ROOT = Path(__file__).parents[2]
KIND = "scripted"

# Runs a server to which this drafter is known.
START_WITH_DRAFTER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from mlx_optiq_ext.drafters._registry import REGISTRY
from tests.serving.scripted_drafter import KIND, ScriptedDrafter
REGISTRY[KIND] = ScriptedDrafter
{START}
"""


def make_drafter(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": KIND}))
    return folder


class ScriptedDrafter:
    name = "scripted"
    reads_hidden_states = False
    computes_drafts = True

    def __init__(self, source: Any):
        self.source = source

    def bind(self, model: nn.Module) -> ScriptedDrafter:
        self.args = model.args
        return self

    def make_cache(self) -> list[Any]:
        return []

    def open(self, prompt_cache: list[Any], *_: Any) -> ScriptedSession:
        return ScriptedSession(self.args, prompt_cache)


class ScriptedSession:
    last_state = None
    num_put_off = 0
    entries = ()

    def __init__(self, args: Any, prompt_cache: list[Any]):
        self.args = args
        self.prompt_cache = prompt_cache

    def prefill(self, tokens: Any, states: Any, embeddings: Any = None) -> None:
        pass

    def draft(
        self, tokens: mx.array, states: Any, num_draft_tokens: int, proposal: Proposal
    ) -> None:
        entry = self.prompt_cache[0]
        # The model's keys are the tokens that it has seen.
        seen = entry.keys[0, 0, : entry.offset, 0].astype(mx.int32).tolist()
        row = [*seen, tokens[-1].item()]
        for _ in range(num_draft_tokens):
            token = next_token(row, self.args.eos_token_id)
            if len(row) % 13 == 0:
                token = (token + 1) % self.args.vocab_size
            row.append(token)
            is_token = mx.arange(self.args.vocab_size) == token
            proposal.add(mx.where(is_token, 50.0, 0.0)[None])

    def catch_up(self) -> None:
        pass

    def close(self, num_tokens: int, last_state: Any) -> None:
        pass
