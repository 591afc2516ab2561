"""The training loop: batches, Muon and AdamW, a schedule, a log, checkpoints."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .rounding import switch_rounding

_LOG_EVERY = 100
_REPORT_EVERY = 1000
_HELD_OUT = ("held_out_code", "held_out_chat")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    The last part of it trains with rounded weights and with more conversations.
    """

    num_steps: int
    max_seconds: float = math.inf
    batch_size: int = 64
    length: int = 1024
    learning_rate: float = 4e-3
    num_warmup_steps: int = 200
    weight_decay: float = 0.1
    rounding_from: float = 0.75
    chat_share: float = 0.15
    late_chat_share: float = 0.3
    seed: int = 0


class Streams:
    """The token streams of the corpus, on the device.

    Args:
        folder (Path): See `text.write_streams`.
        device (torch.device): Where they go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.code = _load(folder / "code.npy", device)
        self.chat = _load(folder / "chat.npy", device)
        self.held_out = {
            name: _load(folder / f"{name}.npy", device) for name in _HELD_OUT
        }

    def batch(self, recipe: Recipe, step: int, num_extra: int) -> Tensor:
        """Draw a step's windows: conversations, then code, [batch, length + extra].

        They depend on the seed and the step alone, so that a run can be resumed.
        """
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_000 + step)
        is_late = step >= recipe.rounding_from * recipe.num_steps
        share = recipe.late_chat_share if is_late else recipe.chat_share
        num_chats = round(share * recipe.batch_size)
        length = recipe.length + num_extra
        parts = [
            _windows(tokens, _draw(tokens, length, count, generator), length)
            for tokens, count in (
                (self.chat, num_chats),
                (self.code, recipe.batch_size - num_chats),
            )
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Task:
    """What is trained, and how it is judged.

    Args:
        model (nn.Module): On its device.
        checkpoint (Path): The file that a run resumes from and ends with.
        num_extra (int): How many tokens a window has beyond its length.
        names (tuple): Of the losses.
        losses_of (Callable): Gets a batch; returns the loss to minimise, and losses for
            the log.
        evaluate (Callable): Gets a held-out stream; returns figures.
    """

    model: nn.Module
    checkpoint: Path
    num_extra: int
    names: tuple[str, ...]
    losses_of: Callable[[Tensor], tuple[Tensor, Tensor]]
    evaluate: Callable[[Tensor], dict[str, float]]


def fit(task: Task, streams: Streams, recipe: Recipe) -> bool:
    """Train, from the checkpoint if there is one, until the end or the time limit.

    Returns:
        bool: Whether all steps are done.
    """
    started = time.monotonic()
    optimizers = _make_optimizers(task.model, recipe)
    first_step = _resume(task, optimizers)
    log = _Log(task)
    for step in range(first_step, recipe.num_steps):
        switch_rounding(task.model, on=step >= recipe.rounding_from * recipe.num_steps)
        _set_learning_rate(optimizers, step, recipe)
        batch = streams.batch(recipe, step, task.num_extra)
        with torch.autocast(batch.device.type, torch.bfloat16):
            total, losses = task.losses_of(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.add(losses.detach(), step)
        num_done = step + 1
        is_out_of_time = time.monotonic() - started > recipe.max_seconds
        is_last = num_done == recipe.num_steps or is_out_of_time
        if is_last or num_done % _REPORT_EVERY == 0:
            log.write(
                num_done, {n: task.evaluate(x) for n, x in streams.held_out.items()}
            )
        if is_last:
            _save(task, optimizers, num_done)
            return num_done == recipe.num_steps
    return True


class _Log:
    """Running means of the losses, printed, and a file for the held-out streams."""

    def __init__(self, task: Task) -> None:
        self._path = task.checkpoint.with_suffix(".jsonl")
        self._names = task.names
        self._started = time.monotonic()
        self._losses: list[Tensor] = []

    def add(self, losses: Tensor, step: int) -> None:
        """Remember a step's losses; now and then wait for the device and print them."""
        self._losses.append(losses)
        if len(self._losses) < _LOG_EVERY:
            return
        means = torch.stack(self._losses).mean(0).tolist()
        self._losses.clear()
        named = zip(self._names, means, strict=True)
        shown = " ".join(f"{name} {mean:.3f}" for name, mean in named)
        seconds = time.monotonic() - self._started
        print(f"{seconds:6.1f} s {step + 1:6d} {shown}", flush=True)

    def write(self, num_done: int, held_out: dict[str, dict[str, float]]) -> None:
        """Write a line about the held-out streams."""
        seconds = round(time.monotonic() - self._started, 1)
        line = json.dumps({"seconds": seconds, "steps": num_done, **held_out})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def held_out_batches(
    tokens: Tensor, *, num_extra: int, length: int = 512, num_windows: int = 256
) -> Iterator[tuple[Tensor, float]]:
    """Yield evenly spread windows in batches, and each batch's share of them all.

    Args:
        tokens (Tensor): A stream, [N].
        num_extra (int): How many tokens a window has beyond its length.
        length (int): Of a window, in tokens.
        num_windows (int): At most so many.
    """
    num_windows = min(num_windows, (len(tokens) - num_extra) // length)
    starts = torch.linspace(0, len(tokens) - length - num_extra, num_windows).long()
    for part in starts.split(32):
        yield _windows(tokens, part, length + num_extra), len(part) / num_windows


@contextmanager
def eager(device: torch.device) -> Iterator[None]:
    """Run as in training, without what was compiled for its shapes."""
    stance = torch.compiler.set_stance("force_eager")
    with stance, torch.autocast(device.type, torch.bfloat16):
        yield


def prepare() -> torch.device:
    """Choose the device, and how it multiplies matrices."""
    torch.set_float32_matmul_precision("high")
    # Layers of several kinds, with and without gradients, are more than torch compiles
    # a function for by default.
    torch._dynamo.config.recompile_limit = 64
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(path: Path, device: torch.device) -> Tensor:
    ids = np.load(path, mmap_mode="r")
    # All ids fit, and torch can index by this type.
    return torch.from_numpy(ids.astype(np.int16)).to(device)


def _draw(
    tokens: Tensor, length: int, count: int, generator: torch.Generator
) -> Tensor:
    return torch.randint(len(tokens) - length, (count,), generator=generator)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    offsets = torch.arange(length, device=tokens.device)
    starts = starts.to(tokens.device, non_blocking=True)
    return tokens[starts[:, None] + offsets].long()


def _make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the matrices, AdamW for all else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(parameter)
    options: dict[str, Any] = {"lr": recipe.learning_rate}
    return [
        torch.optim.Muon(
            matrices,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
            **options,
        ),
        torch.optim.AdamW(
            others, weight_decay=0.0, betas=(0.9, 0.95), fused=True, **options
        ),
    ]


def _set_learning_rate(
    optimizers: list[torch.optim.Optimizer], step: int, recipe: Recipe
) -> None:
    warmup = min(1.0, (step + 1) / recipe.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup * (0.01 + 0.99 * cosine)


def _resume(task: Task, optimizers: list[torch.optim.Optimizer]) -> int:
    if not task.checkpoint.exists():
        return 0
    content = torch.load(task.checkpoint)
    task.model.load_state_dict(content["state"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(content["num_steps"])


def _save(task: Task, optimizers: list[torch.optim.Optimizer], num_steps: int) -> None:
    content = {
        "state": task.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "num_steps": num_steps,
    }
    torch.save(content, task.checkpoint)
