"""Records what the gated delta recurrence does, so that rows can be taken back.

A verify pass leaves a recurrent layer with the state after its last row. The state
after an earlier row is found by running mlx-lm's own recurrence again on fewer rows,
which costs a fraction of a layer and is bit-identical to never having run the rest.
Where a kernel of ours runs, the state after every row is there, and nothing runs again.
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

from ._rows import RowStates, can_keep_rows, keep_rows_in, keeper

NUM_ROW_INPUTS = 5  # q, k, v, a, b of gated_delta_update have a row for each token
STATE_POSITION = 7  # of its arguments

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
    """The inputs of one model's recurrent layers during one forward pass.

    Or, where the kernel runs, the states that the layers keep: ``rows``.
    """

    def __init__(self) -> None:
        self.conv_inputs: list[mx.array] = []
        self.rows: list[RowStates] = []
        self._updates: list[tuple[Any, Any, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        tokens = _active.set(self), recorder.set(self._record)
        keeping = keeper.set(self.rows.append)
        try:
            yield
        finally:
            _active.reset(tokens[0])
            recorder.reset(tokens[1])
            keeper.reset(keeping)

    @property
    def is_needed_for_one_row(self) -> bool:
        """Whether a pass of one row, which is kept or not, is faster with the tape."""
        return can_keep_rows()

    def has_all(self, num_layers: int) -> bool:
        """Tell whether every layer was recorded.

        No update is recorded while mlx-lm is not patched.

        Args:
            num_layers (int): The number of recurrent layers of the model.
        """
        is_replayable = len(self.conv_inputs) == len(self._updates) == num_layers
        return is_replayable or len(self.rows) == num_layers

    def replay(self, entries: Sequence[ArraysCache], num_rows: int) -> None:
        """Set the recurrent states to those after the first rows of the pass.

        Args:
            entries (Sequence[ArraysCache]): The entries of the recurrent layers, in
              order, with the states from before the pass.
            num_rows (int): How many rows to keep, at least 1.
        """
        if self.rows:
            for entry, kept in zip(entries, self.rows, strict=True):
                entry.cache = kept.after(num_rows)
            return
        recorded = zip(entries, self.conv_inputs, self._updates, strict=True)
        for entry, conv_input, (update, args, kwargs) in recorded:
            inputs = args[:NUM_ROW_INPUTS]
            # The input of the convolution is its state followed by the new rows.
            num_state_rows = conv_input.shape[1] - inputs[0].shape[1]
            end = num_rows + num_state_rows
            entry[0] = mx.contiguous(conv_input[:, num_rows:end])
            rows = [x[:, :num_rows] for x in inputs]
            _, entry[1] = update(*rows, *args[NUM_ROW_INPUTS:], **kwargs)

    def replayed(self, num_rows: mx.array, one: slice) -> list[list[mx.array]]:
        """States of every layer after the first rows of the pass.

        Args:
            num_rows (mx.array): How many rows each sequence keeps.
            one (slice): Of which sequences.
        """
        if self.rows:
            return [rows.taken(one, num_rows) for rows in self.rows]
        found = []
        recorded = zip(self.conv_inputs, self._updates, strict=True)
        for conv_input, (update, args, kwargs) in recorded:
            inputs = [x[one] for x in args[:NUM_ROW_INPUTS]]
            num_state_rows = conv_input.shape[1] - inputs[0].shape[1]
            places = num_rows[:, None] + mx.arange(num_state_rows)
            conv = mx.take_along_axis(conv_input[one], places[..., None], axis=1)
            mask = mx.arange(inputs[0].shape[1]) < num_rows[:, None]
            constants = args[NUM_ROW_INPUTS:STATE_POSITION]
            state = args[STATE_POSITION][one]
            _, state = update(*inputs, *constants, state, mask, **kwargs)
            found.append([conv, state])
        return found

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
    """Let the layers of a known recurrence show a tape what they do.

    Nothing else about the model changes.

    Args:
        model (nn.Module): A model for which ``has_known_recurrence`` is true.
    """
    for mixer in _mixers(model):
        if type(mixer.conv1d) is nn.Conv1d:
            mixer.conv1d.__class__ = TapedConv1d
        keep_rows_in(mixer)


def _mixers(model: nn.Module) -> list[nn.Module]:
    return [layer.linear_attn for layer in model.layers if "linear_attn" in layer]
