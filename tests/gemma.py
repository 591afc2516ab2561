"""Tiny Gemma-4 models, their assistants and what transformers makes of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext.drafters import GemmaAssistantDrafter, Proposal
from tests.helpers import ORACLE

# The first has per-layer inputs, shared keys and values and a centroid head, as E4B.
# The second has experts, keys that are values and a tied head, as 26B-A4B.
E4B, A4B = "gemma4_tiny", "gemma4_tiny_26b"
KINDS = [E4B, A4B]
VOCAB_SIZE = 512
WINDOW = 8
TYPES = ("full_attention", "sliding_attention")


def target_folder(kind: str) -> Path:
    return ORACLE / kind


def assistant_folder(kind: str) -> Path:
    return ORACLE / f"{kind}_assistant"


def load_target(kind: str, **config: Any) -> Any:
    model, _ = load_model(target_folder(kind), model_config=config)
    return model


def load_drafter(kind: str, **options: Any) -> GemmaAssistantDrafter:
    return GemmaAssistantDrafter.from_pretrained(assistant_folder(kind), **options)


def golden(kind: str) -> dict[str, mx.array]:
    with np.load(target_folder(kind) / "golden.npz") as arrays:
        return {name: mx.array(x) for name, x in arrays.items() if x.dtype.kind in "if"}


def golden_kv(expected: dict[str, mx.array], num_tokens: int) -> dict[str, Any]:
    return {
        kind: tuple(expected[f"a{num_tokens}_{kind}_{x}"] for x in "kv")
        for kind in TYPES
    }


def difference(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return mx.abs(found - expected).max().item()


def add_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with a word for each token; the word of 1 ends the text."""
    words = {f"w{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w1", bos_token="w2", unk_token="w0"
    )
    fast.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}w4"
    fast.save_pretrained(folder)
    return folder


def copy(
    source: Path, folder: Path, edit: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Copy a checkpoint and edit its configuration."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz"))
    config = json.loads((folder / "config.json").read_text())
    if edit is not None:
        edit(config)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class GuidedDrafter:
    """A drafter whose drafts are made right where it is told to.

    Args:
        drafter: The drafter to guide; random weights are never right by themselves.
        script (list[int]): The tokens that plain decoding emits.
        is_right (Callable): Whether the draft for a position of the script is right.
        watch (Callable, optional): A function that is called before each draft, with
            the model, the prompt cache and the number of tokens emitted so far.
    """

    name = "guided"
    reads_hidden_states = True
    computes_drafts = True

    def __init__(
        self,
        drafter: Any,
        script: list[int],
        is_right: Callable[[int], bool],
        watch: Callable[[Any, list[Any], int], None] = lambda *_: None,
    ):
        self.drafter = drafter
        self.script = script
        self.is_right = is_right
        self.watch = watch
        # An item has the number of tokens emitted before a draft token, the tokens
        # drafted before it, and its logits.
        self.proposed: list[tuple[int, list[mx.array], mx.array]] = []

    def bind(self, model: nn.Module) -> GuidedDrafter:
        self.model = model
        self.bound = self.drafter.bind(model)
        return self

    def open(self, prompt_cache: list[Any], *args: Any) -> GuidedSession:
        session = self.bound.open(prompt_cache, *args)
        return GuidedSession(self, session, prompt_cache)


class GuidedSession:
    last_state = None
    num_put_off = 0
    entries = ()

    def __init__(self, drafter: GuidedDrafter, session: Any, prompt_cache: list[Any]):
        self.drafter = drafter
        self.session = session
        self.prompt_cache = prompt_cache
        self.num_seen = 0

    def prefill(self, *args: Any) -> None:
        self.session.prefill(*args)

    def draft(
        self, tokens: mx.array, states: Any, num_draft_tokens: int, proposal: Proposal
    ) -> None:
        self.num_seen += tokens.size
        self.drafter.watch(self.drafter.model, self.prompt_cache, self.num_seen)
        guided = GuidedProposal(self.drafter, proposal, self.num_seen)
        self.session.draft(tokens, states, num_draft_tokens, guided)

    def catch_up(self) -> None:
        self.session.catch_up()

    def close(self, *args: Any) -> None:
        self.session.close(*args)


class GuidedProposal:
    def __init__(self, drafter: GuidedDrafter, proposal: Proposal, num_seen: int):
        self.drafter = drafter
        self.proposal = proposal
        self.num_seen = num_seen

    @property
    def tokens(self) -> list[mx.array]:
        return self.proposal.tokens

    def add(self, logits: mx.array) -> None:
        self.drafter.proposed.append((self.num_seen, self.tokens, logits))
        position = self.num_seen + len(self.tokens)
        script = self.drafter.script
        if position < len(script) and self.drafter.is_right(position):
            logits = mx.where(mx.arange(VOCAB_SIZE) == script[position], 30.0, 0.0)[
                None
            ]
        self.proposal.add(logits)
