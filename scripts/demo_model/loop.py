"""The training loop: batches of one stream, AdamW, a schedule, a log, checkpoints."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import dataclasses
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

_LOG_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """A training run; `max_seconds`, compilation included, can shorten its schedule."""

    num_steps: int = 7510
    max_seconds: float = math.inf
    batch_size: int = 64
    length: int = 1024
    learning_rate: float = 6e-3
    num_warmup_steps: int = 300
    weight_decay: float = 0.1
    seed: int = 0


def fit(
    model: nn.Module,
    tokens: Tensor,
    recipe: Recipe,
    log: Log,
    *,
    num_extra: int,
    losses_of: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    report: Callable[[int], dict[str, Any]],
) -> None:
    """Train a model.

    Args:
        model (nn.Module): On the device of the tokens.
        tokens (Tensor): The stream, [N].
        recipe (Recipe): What to do.
        log (Log): Is told of each step and, every minute, of the report.
        num_extra (int): How many tokens a window of a batch has beyond its length.
        losses_of (Callable): Gets a batch and the progress, 0 to 1; returns the loss to
            minimise, and losses for the log.
        report (Callable): Gets the number of steps; evaluates and saves the model.
    """
    optimizer = _make_optimizer(model, recipe)
    clock = Clock(recipe)
    for batch in _batches(tokens, recipe, num_extra):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(clock, recipe)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            total, losses = losses_of(batch, clock.progress)
            total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        log.add(losses.detach(), batch[:, num_extra:].numel())
        if log.is_due or clock.progress >= 1:
            log.write(report(clock.num_steps))
        if clock.progress >= 1:
            break


class Clock:
    """How far training is, by steps or by the time left, whichever is further.

    Args:
        recipe (Recipe): The limits.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._started = time.monotonic()
        self._compiled = self._started
        self.num_steps = 0
        self.progress = 0.0

    def tick(self) -> None:
        """Count a step. The first one compiles, which is not progress."""
        now = time.monotonic()
        self.num_steps += 1
        if self.num_steps == 1:
            self._compiled = now
        time_left = self._recipe.max_seconds - (self._compiled - self._started)
        share_of_time = (now - self._compiled) / time_left
        self.progress = max(self.num_steps / self._recipe.num_steps, share_of_time)


class Log:
    """Running means of the losses, printed, and a file for the held-out streams.

    Args:
        path (Path): The file, a line of JSON a minute.
        names (tuple): Of the losses.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._path.write_text("")
        self._names = names
        self._started = self._last_write = time.monotonic()
        self._losses: list[Tensor] = []
        self._num_tokens = 0

    @property
    def is_due(self) -> bool:
        """Whether a minute has passed since the last line."""
        return time.monotonic() - self._last_write > 60

    def add(self, losses: Tensor, num_tokens: int) -> None:
        """Remember a step's losses; now and then wait for the device and print them."""
        self._losses.append(losses)
        self._num_tokens += num_tokens
        if len(self._losses) < _LOG_EVERY:
            return
        means = torch.stack(self._losses).mean(0).tolist()
        self._losses.clear()
        named = zip(self._names, means, strict=True)
        shown = " ".join(f"{name} {mean:.3f}" for name, mean in named)
        seconds = time.monotonic() - self._started
        print(f"{seconds:6.1f} s {self._num_tokens / 1e6:7.1f} M {shown}", flush=True)

    def write(self, held_out: dict[str, dict[str, float]]) -> None:
        """Write a line about the held-out streams."""
        self._last_write = time.monotonic()
        seconds = round(self._last_write - self._started, 1)
        line = json.dumps({"seconds": seconds, "tokens": self._num_tokens, **held_out})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def load_streams(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read streams.npz, see `text.write_streams`."""
    return {name: _to_device(ids, device) for name, ids in np.load(path).items()}


def held_out_batches(
    tokens: Tensor, *, length: int, num_windows: int, num_extra: int
) -> Iterator[tuple[Tensor, float]]:
    """Yield evenly spread windows in batches, and each batch's share of them all.

    Args:
        tokens (Tensor): A stream, [N].
        length (int): Of a window, in tokens.
        num_windows (int): At most so many.
        num_extra (int): How many tokens a window has beyond its length.
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


def save(model: nn.Module, path: Path, num_steps: int, recipe: Recipe) -> None:
    """Write a checkpoint.

    Args:
        model (nn.Module): Its `state` is written.
        path (Path): The file.
        num_steps (int): Trained so far.
        recipe (Recipe): The run's.
    """
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    checkpoint = {
        "state": state,
        "num_steps": num_steps,
        "recipe": dataclasses.asdict(recipe),
    }
    torch.save(checkpoint, path)


def _to_device(ids: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    offsets = torch.arange(length, device=tokens.device)
    return tokens[starts.to(tokens.device)[:, None] + offsets]


def _batches(tokens: Tensor, recipe: Recipe, num_extra: int) -> Iterator[Tensor]:
    """Cut the stream at a new random offset and shuffle the windows, epoch by epoch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    length = recipe.length
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        num_windows = (len(tokens) - offset - num_extra) // length
        order = torch.randperm(num_windows, generator=generator)
        starts = offset + length * order.to(tokens.device)
        for part in starts.split(recipe.batch_size):
            if len(part) == recipe.batch_size:
                yield _windows(tokens, part, length + num_extra)


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (decayed if is_matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def _learning_rate(clock: Clock, recipe: Recipe) -> float:
    warmup = min(1.0, (clock.num_steps + 1) / recipe.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, clock.progress)))
    return recipe.learning_rate * warmup * (0.01 + 0.99 * cosine)
