"""Training: language model and head together, the head by distillation."""

# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .model import Qwen35, Shape

_LOG_EVERY = 100
_LOSS_NAMES = ("lm", "mtp", "chain")
_HELD_OUT = ("code", "chat")


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
    mtp_weight: float = 1.0
    chain_weight: float = 0.5
    seed: int = 0


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
    tokens = {name: _to_device(ids, device) for name, ids in np.load(streams).items()}
    model = Qwen35(Shape(), seed=recipe.seed).to(device)
    finish = _finish
    if is_compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        finish = torch.compile(_finish, dynamic=False)
    optimizer = _make_optimizer(model, recipe)
    log = Log(output)
    clock = Clock(recipe)
    for batch in _batches(tokens["train"], recipe):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(clock, recipe)
        with torch.autocast(device.type, torch.bfloat16):
            losses = finish(model, batch, model.model(batch[:, :-2]))
            _total(losses, clock.progress, recipe).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        log.add(losses.detach(), batch[:, 2:].numel())
        if log.is_due or clock.progress >= 1:
            log.write({name: evaluate(model, tokens[name]) for name in _HELD_OUT})
            _save(model, output / "checkpoint.pt", clock.num_steps, recipe)
        if clock.progress >= 1:
            break


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
    num_windows = min(num_windows, (len(tokens) - 2) // length)
    starts = torch.linspace(0, len(tokens) - length - 2, num_windows).long()
    sums: dict[str, list[float]] = {}
    for part in starts.split(32):
        batch = _windows(tokens, part, length + 2)
        stance = torch.compiler.set_stance("force_eager")
        with stance, torch.autocast(tokens.device.type, torch.bfloat16):
            hidden = model.model(batch[:, :-2])
            logits = _all_logits(model, batch, hidden)
            losses = _losses(*logits, batch).tolist()
        choice, *drafts = (each.argmax(-1) for each in logits)
        figures = dict(zip(_LOSS_NAMES, losses, strict=True))
        for i, draft in enumerate(drafts, start=1):
            agrees = draft[:, :-i] == choice[:, i:]
            figures[f"agreement_{i}"] = agrees.float().mean().item()
        for name, figure in figures.items():
            sums.setdefault(name, []).append(figure * len(part) / num_windows)
    return {name: round(sum(parts), 4) for name, parts in sums.items()}


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
    """Running means of the losses, printed, and log.jsonl for the held-out streams.

    Args:
        folder (Path): Where log.jsonl goes.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        self._path.write_text("")
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
        named = zip(_LOSS_NAMES, means, strict=True)
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


def _to_device(ids: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    offsets = torch.arange(length, device=tokens.device)
    return tokens[starts.to(tokens.device)[:, None] + offsets]


def _batches(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Cut the stream at a new random offset and shuffle the windows, epoch by epoch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    length = recipe.length
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        num_windows = (len(tokens) - offset - 2) // length
        order = torch.randperm(num_windows, generator=generator)
        starts = offset + length * order.to(tokens.device)
        for part in starts.split(recipe.batch_size):
            if len(part) == recipe.batch_size:
                yield _windows(tokens, part, length + 2)


def _make_optimizer(model: Qwen35, recipe: Recipe) -> torch.optim.Optimizer:
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


def _save(model: Qwen35, path: Path, num_steps: int, recipe: Recipe) -> None:
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    checkpoint = {
        "state": state,
        "num_steps": num_steps,
        "recipe": dataclasses.asdict(recipe),
    }
    torch.save(checkpoint, path)
