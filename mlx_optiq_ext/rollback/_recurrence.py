"""Records the inputs of the gated delta recurrence, so that fewer rows can be replayed.

A verify pass leaves a recurrent layer with the state after its last row. The state
after an earlier row is found by running mlx-lm's own recurrence again on fewer rows,
which costs a fraction of a layer and is bit-identical to never having run the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.qwen3_5 import GatedDeltaNet

from .._errors import SpeculationError

NUM_ROW_INPUTS = 5  # q, k, v, a, b of gated_delta_update have a row for each token

Recorder = Callable[[Any, Any, Any], None]

# While a pass may be rolled back, the recorder is called with mlx-lm's recurrence and
# its arguments.
recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)

_active: ContextVar[Tape | None] = ContextVar("active", default=None)


class TapedConv1d(nn.Conv1d):
    """The convolution of a gated delta layer, which shows its input to the tape."""

    def __call__(self, x: mx.array) -> mx.array:
        if (tape := _active.get()) is not None:
            tape.conv_inputs.append(x)
        return super().__call__(x)


class Tape:
    """The inputs of one model's recurrent layers during one forward pass."""

    def __init__(self) -> None:
        self.conv_inputs: list[mx.array] = []
        self._updates: list[tuple[Any, Any, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        tokens = _active.set(self), recorder.set(self._record)
        try:
            yield
        finally:
            _active.reset(tokens[0])
            recorder.reset(tokens[1])

    def has_all(self, num_layers: int) -> bool:
        """Tell whether every layer was recorded.

        No update is recorded while mlx-lm is not patched.

        Args:
            num_layers (int): The number of recurrent layers of the model.
        """
        return len(self.conv_inputs) == len(self._updates) == num_layers

    def recorded(self, num_layers: int) -> list[tuple[mx.array, tuple[Any, Any, Any]]]:
        """Of each layer, the input of its convolution, and the call of its recurrence.

        Raises:
            SpeculationError: If not every layer was recorded.
        """
        if not self.has_all(num_layers):
            raise SpeculationError("Cannot speculate: mlx-lm is not patched.")
        return list(zip(self.conv_inputs, self._updates, strict=True))

    def replay(self, entries: Sequence[ArraysCache], num_rows: int) -> None:
        """Set the recurrent states to those after the first rows of the pass.

        Args:
            entries (Sequence[ArraysCache]): The entries of the recurrent layers, in
              order, with the states from before the pass.
            num_rows (int): How many rows to keep, at least 1.
        """
        recorded = zip(entries, self.conv_inputs, self._updates, strict=True)
        for entry, conv_input, (update, args, kwargs) in recorded:
            inputs = args[:NUM_ROW_INPUTS]
            # The input of the convolution is its state followed by the new rows.
            num_state_rows = conv_input.shape[1] - inputs[0].shape[1]
            end = num_rows + num_state_rows
            entry[0] = mx.contiguous(conv_input[:, num_rows:end])
            rows = [x[:, :num_rows] for x in inputs]
            _, entry[1] = update(*rows, *args[NUM_ROW_INPUTS:], **kwargs)

    def _record(self, update: Any, args: Any, kwargs: Any) -> None:
        self._updates.append((update, args, kwargs))


def has_known_recurrence(model: nn.Module) -> bool:
    """Tell whether a model is recurrent in a way that a tape can replay.

    Args:
        model (nn.Module): A model of any family.
    """
    mixers = _mixers(model)
    return bool(mixers) and all(isinstance(mixer, GatedDeltaNet) for mixer in mixers)


def prepare_recurrence(model: nn.Module) -> None:
    """Let the convolutions of a known recurrence show their input to a tape.

    Nothing else about the model changes.

    Args:
        model (nn.Module): A model for which ``has_known_recurrence`` is true.
    """
    for mixer in _mixers(model):
        if type(mixer.conv1d) is nn.Conv1d:
            mixer.conv1d.__class__ = TapedConv1d


def _mixers(model: nn.Module) -> list[nn.Module]:
    return [layer.linear_attn for layer in model.layers if "linear_attn" in layer]
