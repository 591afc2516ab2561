"""Training: language model and head together, the head by distillation."""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from . import loop
from .loop import Streams, Task, eager, fit, held_out_batches, prepare
from .model import Qwen35, Shape

_NUM_DRAFTS = 4
# The drafts after the first are made for this part of a batch.
_CHAINED_SHARE = 0.25
_LOSS_NAMES = ("lm", *(f"draft_{i}" for i in range(1, _NUM_DRAFTS + 1)))


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    """A training run, and what its drafts count for."""

    draft_weights: tuple[float, ...] = (0.3, 0.15, 0.1, 0.1)


def train(streams: Path, output: Path, recipe: Recipe, *, is_compiled: bool) -> bool:
    """Train a model and write checkpoint.pt and checkpoint.jsonl.

    Args:
        streams (Path): The folder that `text.write_streams` wrote to.
        output (Path): The folder that is written.
        recipe (Recipe): What to do.
        is_compiled (bool): Whether to use torch.compile, for CUDA.

    Returns:
        bool: Whether all steps are done.
    """
    device = prepare()
    model = Qwen35(Shape(), seed=recipe.seed).to(device)
    finish = _finish
    if is_compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        finish = torch.compile(_finish, dynamic=False)
    weights = torch.tensor((1.0, *recipe.draft_weights), device=device)
    num_chained = round(_CHAINED_SHARE * recipe.batch_size)

    def losses_of(batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.model(batch[:, :-_NUM_DRAFTS])
        losses = finish(model, batch, hidden, num_chained)
        return losses @ weights, losses

    def judge(tokens: Tensor) -> dict[str, float]:
        return evaluate(model, tokens)

    task = Task(
        model=model,
        checkpoint=output / "checkpoint.pt",
        num_extra=_NUM_DRAFTS,
        names=_LOSS_NAMES,
        losses_of=losses_of,
        evaluate=judge,
    )
    return fit(task, Streams(streams, device), recipe)


@torch.no_grad()
def evaluate(model: Qwen35, tokens: Tensor) -> dict[str, float]:
    """Measure losses in nats per token and teacher-forced greedy agreement.

    Args:
        model (Qwen35): The model.
        tokens (Tensor): A held-out stream, [N].
    """
    sums: dict[str, float] = {}
    for batch, share in held_out_batches(tokens, num_extra=_NUM_DRAFTS):
        with eager(tokens.device):
            hidden = model.model(batch[:, :-_NUM_DRAFTS])
            logits, drafts = _all_logits(model, batch, hidden, len(batch))
            losses = _losses(logits, drafts, batch).tolist()
        choice = logits.argmax(-1)
        figures = dict(zip(_LOSS_NAMES, losses, strict=True))
        for i, draft in enumerate(drafts, start=1):
            agrees = draft.argmax(-1)[:, :-i] == choice[:, i:]
            figures[f"agreement_{i}"] = agrees.float().mean().item()
        for name, figure in figures.items():
            sums[name] = sums.get(name, 0.0) + figure * share
    return {name: round(total, 4) for name, total in sums.items()}


def _finish(model: Qwen35, batch: Tensor, hidden: Tensor, num_chained: int) -> Tensor:
    return _losses(*_all_logits(model, batch, hidden, num_chained), batch)


def _all_logits(
    model: Qwen35, batch: Tensor, hidden: Tensor, num_chained: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the model's logits and each draft's, the later ones of fewer rows."""
    embeddings = model.model.embed_tokens(batch[:, 1:])
    length = hidden.shape[1]
    first = model.mtp(embeddings[:, :length], hidden)
    rows = slice(len(batch) // num_chained - 1, None, len(batch) // num_chained)
    chained = model.mtp.chain(
        embeddings[rows], hidden[rows], first[rows], _NUM_DRAFTS - 1
    )
    drafts = [model.project(draft) for draft in (first, *chained)]
    return model.project(hidden), drafts


def _losses(logits: Tensor, drafts: list[Tensor], batch: Tensor) -> Tensor:
    """Return the language model's loss and how far each draft is from the model.

    Draft i at position p should be what the language model says at position p + i.
    """
    next_tokens = batch[:, 1 : logits.shape[1] + 1]
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), next_tokens.flatten())
    target = logits.detach().float().softmax(-1)
    losses = [loss]
    for i, draft in enumerate(drafts, start=1):
        step = len(target) // len(draft)
        wanted = target[step - 1 :: step, i:]
        chosen = draft[:, :-i].float().log_softmax(-1)
        losses.append(-(wanted * chosen).sum(-1).mean())
    return torch.stack(losses)
