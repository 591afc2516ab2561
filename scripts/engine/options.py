"""Adds the options that choose a model of real shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click
import mlx.core as mx

from .models import PRESETS, Preset, Weights

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Subject:
    """The model that is measured: its shape, and how its weights are stored."""

    name: str
    dtype: str
    bits: str | None

    @property
    def preset(self) -> Preset:
        return PRESETS[self.name]

    @property
    def vocab_size(self) -> int:
        size: int = self.preset.config["vocab_size"]
        return size

    @property
    def weights(self) -> Weights:
        return Weights(getattr(mx, self.dtype), int(self.bits) if self.bits else None)

    @property
    def precision(self) -> str:
        return self.dtype + (f", {self.bits} bits" if self.bits else "")

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}"


def subject_options(command: Callable[..., None]) -> Any:
    """Add options to a command whose argument ``subject`` is a ``Subject``."""

    @click.option("--preset", type=click.Choice(list(PRESETS)), default="qwen-400m")
    @click.option("--dtype", type=click.Choice(DTYPES), default="float32")
    @click.option("--bits", type=click.Choice(["4", "8"]), help="Quantise the model.")
    @wraps(command)
    def called(preset: str, dtype: str, bits: str | None, **options: Any) -> None:
        command(subject=Subject(preset, dtype, bits), **options)

    return called
