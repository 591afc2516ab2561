"""Training: language model and head together, the head by distillation."""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import loop
from .loop import Log, eager, fit, held_out_batches, load_streams, save
from .model import Qwen35, Shape

_LOSS_NAMES = ("lm", "mtp", "chain")
_HELD_OUT = ("code", "chat")


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    """A training run, and what its drafts count for."""

    mtp_weight: float = 1.0
    chain_weight: float = 0.5


def train(streams: Path, output: Path, recipe: Recipe, *, is_compiled: bool) -> None:
    """Train a model and write checkpoint.pt and log.jsonl.

    Args:
        streams (Path): streams.npz, see `text.write_streams`.
        output (Path): The folder that is written, every minute.
        recipe (Recipe): What to do.
        is_compiled (bool): Whether to use torch.compile, for CUDA.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokens = load_streams(streams, device)
    model = Qwen35(Shape(), seed=recipe.seed).to(device)
    finish = _finish
    if is_compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        finish = torch.compile(_finish, dynamic=False)

    def losses_of(batch: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        losses = finish(model, batch, model.model(batch[:, :-2]))
        return _total(losses, progress, recipe), losses

    def report(num_steps: int) -> dict[str, Any]:
        held_out = {name: evaluate(model, tokens[name]) for name in _HELD_OUT}
        save(model, output / "checkpoint.pt", num_steps, recipe)
        return held_out

    fit(
        model,
        tokens["train"],
        recipe,
        Log(output / "log.jsonl", _LOSS_NAMES),
        num_extra=2,
        losses_of=losses_of,
        report=report,
    )


@torch.no_grad()
def evaluate(
    model: Qwen35, tokens: Tensor, *, length: int = 512, num_windows: int = 256
) -> dict[str, float]:
    """Measure losses in nats per token and teacher-forced greedy agreement.

    Args:
        model (Qwen35): The model.
        tokens (Tensor): A held-out stream, [N].
        length (int): Of a window, in tokens.
        num_windows (int): At most so many windows, evenly spread over the stream.
    """
    sums: dict[str, list[float]] = {}
    for batch, share in held_out_batches(
        tokens, length=length, num_windows=num_windows, num_extra=2
    ):
        with eager(tokens.device):
            hidden = model.model(batch[:, :-2])
            logits = _all_logits(model, batch, hidden)
            losses = _losses(*logits, batch).tolist()
        choice, *drafts = (each.argmax(-1) for each in logits)
        figures = dict(zip(_LOSS_NAMES, losses, strict=True))
        for i, draft in enumerate(drafts, start=1):
            agrees = draft[:, :-i] == choice[:, i:]
            figures[f"agreement_{i}"] = agrees.float().mean().item()
        for name, figure in figures.items():
            sums.setdefault(name, []).append(figure * share)
    return {name: round(sum(parts), 4) for name, parts in sums.items()}


def _total(losses: Tensor, progress: float, recipe: Recipe) -> Tensor:
    """Weigh the losses. The drafts bend the trunk towards them mostly late."""
    language, first, second = losses.unbind()
    drafts = recipe.mtp_weight * first + recipe.chain_weight * second
    return language + (0.2 + 0.8 * progress) * drafts


def _finish(model: Qwen35, batch: Tensor, hidden: Tensor) -> Tensor:
    return _losses(*_all_logits(model, batch, hidden), batch)


def _all_logits(
    model: Qwen35, batch: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    embeddings = model.model.embed_tokens(batch[:, 1:])
    first = model.mtp(embeddings[:, :-1], hidden)
    second = model.mtp.chain(embeddings[:, :-1], hidden, embeddings[:, 1:], first)
    return model.project(hidden), model.project(first), model.project(second)


def _losses(logits: Tensor, first: Tensor, second: Tensor, batch: Tensor) -> Tensor:
    """Return the language model's loss and how far each draft is from the model.

    Draft i at position p should be what the language model says at position p + i.
    """
    next_tokens = batch[:, 1 : logits.shape[1] + 1]
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), next_tokens.flatten())
    target = logits.detach().float().softmax(-1)
    drafts = [
        -(target[:, i:] * draft[:, :-i].float().log_softmax(-1)).sum(-1).mean()
        for i, draft in enumerate((first, second), start=1)
    ]
    return torch.stack([loss, *drafts])
