"""Training: the language model first, then the assistant, by distillation."""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from demo_model.loop import (
    Recipe,
    Streams,
    Task,
    eager,
    fit,
    held_out_batches,
    prepare,
)
from demo_model.rounding import switch_rounding
from torch import Tensor
from torch.nn import functional

from .model import ASSISTANT, TARGET, Assistant, Gemma4

# What a round's drafts count for, the first to the last.
DRAFT_WEIGHTS = (1.0, 0.5, 0.25, 0.25)
_NUM_DRAFTS = len(DRAFT_WEIGHTS)


def train_target(
    streams: Path, output: Path, recipe: Recipe, *, is_compiled: bool
) -> bool:
    """Train the language model and write target.pt and target.jsonl.

    Args:
        streams (Path): The folder that `demo_model.text.write_streams` wrote to.
        output (Path): The folder that is written.
        recipe (Recipe): What to do.
        is_compiled (bool): Whether to use torch.compile, for CUDA.

    Returns:
        bool: Whether all steps are done.
    """
    device = prepare()
    model = Gemma4(TARGET, seed=recipe.seed).to(device)
    loss_of = _language_loss
    if is_compiled:
        _compile_layers(model)
        loss_of = torch.compile(_language_loss, dynamic=False)

    def losses_of(batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = model(batch[:, :-1])
        loss = loss_of(model, hidden, batch[:, 1:])
        return loss, loss[None]

    def evaluate(tokens: Tensor) -> dict[str, float]:
        return evaluate_target(model, tokens)

    task = Task(
        model=model,
        checkpoint=output / "target.pt",
        num_extra=1,
        names=("lm",),
        losses_of=losses_of,
        evaluate=evaluate,
    )
    return fit(task, Streams(streams, device), recipe)


def train_assistant(
    streams: Path, output: Path, recipe: Recipe, *, is_compiled: bool
) -> bool:
    """Distil the assistant of target.pt and write assistant.pt and assistant.jsonl.

    Args:
        streams (Path): The folder that `demo_model.text.write_streams` wrote to.
        output (Path): The folder that has target.pt and is written.
        recipe (Recipe): What to do.
        is_compiled (bool): Whether to use torch.compile, for CUDA.

    Returns:
        bool: Whether all steps are done.
    """
    device = prepare()
    target = Gemma4(TARGET).to(device).requires_grad_(False)
    target.load_state_dict(torch.load(output / "target.pt")["state"])
    switch_rounding(target, on=True)
    model = Assistant(ASSISTANT, TARGET.hidden_size, seed=recipe.seed).to(device)
    losses_of_batch = _draft_losses
    if is_compiled:
        _compile_layers(target)
        losses_of_batch = torch.compile(_draft_losses, dynamic=False)
    weights = torch.tensor(DRAFT_WEIGHTS, device=device)

    def losses_of(batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden, shared = target(batch[:, :-_NUM_DRAFTS])
        losses, _ = losses_of_batch(target, model, batch, hidden, shared)
        return losses @ weights, losses

    def evaluate(tokens: Tensor) -> dict[str, float]:
        return evaluate_assistant(target, model, tokens)

    task = Task(
        model=model,
        checkpoint=output / "assistant.pt",
        num_extra=_NUM_DRAFTS,
        names=tuple(f"draft_{i}" for i in range(1, _NUM_DRAFTS + 1)),
        losses_of=losses_of,
        evaluate=evaluate,
    )
    return fit(task, Streams(streams, device), recipe)


@torch.no_grad()
def evaluate_target(model: Gemma4, tokens: Tensor) -> dict[str, float]:
    """Measure the loss in nats per token.

    Args:
        model (Gemma4): The model.
        tokens (Tensor): A held-out stream, [N].
    """
    loss = 0.0
    for batch, share in held_out_batches(tokens, num_extra=1):
        with eager(tokens.device):
            hidden, _ = model(batch[:, :-1])
            loss += _language_loss(model, hidden, batch[:, 1:]).item() * share
    return {"lm": round(loss, 4)}


@torch.no_grad()
def evaluate_assistant(
    target: Gemma4, model: Assistant, tokens: Tensor
) -> dict[str, float]:
    """Measure losses in nats per token and teacher-forced greedy agreement.

    Args:
        target (Gemma4): The language model.
        model (Assistant): Its assistant.
        tokens (Tensor): A held-out stream, [N].
    """
    sums = torch.zeros(2, _NUM_DRAFTS, device=tokens.device)
    for batch, share in held_out_batches(tokens, num_extra=_NUM_DRAFTS):
        with eager(tokens.device):
            hidden, shared = target(batch[:, :-_NUM_DRAFTS])
            figures = _draft_losses(target, model, batch, hidden, shared)
        sums += torch.stack(figures) * share
    losses, agreements = sums.tolist()
    named = [
        *((f"draft_{i}", loss) for i, loss in enumerate(losses, start=1)),
        *((f"agreement_{i}", share) for i, share in enumerate(agreements, start=1)),
    ]
    return {name: round(figure, 4) for name, figure in named}


def _language_loss(model: Gemma4, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    logits = model.project(hidden).flatten(0, 1)
    return functional.cross_entropy(logits, next_tokens.flatten())


def _draft_losses(
    target: Gemma4, model: Assistant, batch: Tensor, hidden: Tensor, shared: Any
) -> tuple[Tensor, Tensor]:
    """Return how far each draft is from the model, and how often it is its choice.

    Draft i at position p should be what the language model says at position p + i.
    """
    logits = target.project(hidden)
    wanted, choice = logits.softmax(-1), logits.argmax(-1)
    length = hidden.shape[1]
    losses, agreements = [], []
    for i in range(1, _NUM_DRAFTS + 1):
        embeddings = target.embed(batch[:, i : length + i])
        draft, hidden = model(embeddings, hidden, shared)
        draft = draft[:, :-i]
        losses.append(-(wanted[:, i:] * draft.log_softmax(-1)).sum(-1).mean())
        agreements.append((draft.argmax(-1) == choice[:, i:]).float().mean())
    return torch.stack(losses), torch.stack(agreements)


def _compile_layers(model: Gemma4) -> None:
    # Layer by layer takes a minute less than all at once.
    for layer in model.layers:
        layer.compile(dynamic=False)
