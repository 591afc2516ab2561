"""Records what the gated delta recurrence does, so that rows can be taken back.

A verify pass leaves a recurrent layer with the state after its last row. On Metal,
where mlx-lm has a kernel for all rows, the state after an earlier row is found by
running the recurrence again on fewer rows, which costs a fraction of a layer. Elsewhere
mlx-lm computes one row after the other, and the state after each is kept instead. Both
are bit-identical to never having run the rest. Where a kernel of ours runs, it writes
the state after every row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
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

Recorder = Callable[[Any, Any, Any], Any]

# While a pass may be rolled back, the recorder is called with mlx-lm's recurrence and
# its arguments, and returns what that returns.
recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)

_active: ContextVar[Tape | None] = ContextVar("active", default=None)


class TapedConv1d(nn.Conv1d):
    """The convolution of a gated delta layer, which shows its input to the tape."""

    def __call__(self, x: mx.array) -> mx.array:
        if (tape := _active.get()) is not None:
            tape.conv_inputs.append(x)
        return super().__call__(x)


class Call:
    """A call of mlx-lm's recurrence, which can be made again for fewer rows.

    Args:
        update (Callable): mlx-lm's ``gated_delta_update``.
        args (tuple): Its positional arguments.
        kwargs (dict): Its other arguments.
    """

    def __init__(self, update: Any, args: Any, kwargs: Any):
        self._update, self._args, self._kwargs = update, args, kwargs

    @property
    def num_rows(self) -> int:
        return int(self._args[0].shape[1])

    def run(self) -> Any:
        return self._update(*self._args, **self._kwargs)

    def state_after(self, num_rows: int) -> mx.array:
        """The state after the first rows, of which there is at least one."""
        return self._on_rows(slice(num_rows))[1]

    def states_after(
        self, num_rows: mx.array, one: slice, numbers: Collection[int]
    ) -> mx.array:
        """The states of some sequences after as many rows as each keeps.

        Args:
            num_rows (mx.array): The number of each, ``[num_sequences]``.
            one (slice): Of which sequences.
            numbers (Collection[int]): No other number is in ``num_rows``.
        """
        inputs = [x[one] for x in self._args[:NUM_ROW_INPUTS]]
        constants = self._args[NUM_ROW_INPUTS:STATE_POSITION]
        state = self._args[STATE_POSITION][one]
        mask = mx.arange(self.num_rows) < num_rows[:, None]
        return self._update(*inputs, *constants, state, mask, **self._kwargs)[1]

    def _on_rows(self, rows: slice, *state: mx.array | None) -> Any:
        """Run the recurrence on some rows, from another state if one is given."""
        inputs = [x[:, rows] for x in self._args[:NUM_ROW_INPUTS]]
        others = list(self._args[NUM_ROW_INPUTS:])
        if state:
            others[STATE_POSITION - NUM_ROW_INPUTS] = state[0]
        return self._update(*inputs, *others, **self._kwargs)


class CallByRow(Call):
    """The same where mlx-lm has no kernel: the state after every row is kept."""

    def run(self) -> Any:
        state, outputs = self._args[STATE_POSITION], []
        self._states = [state]
        for row in range(self.num_rows):
            output, state = self._on_rows(slice(row, row + 1), state)
            outputs.append(output)
            self._states.append(state)
        return mx.concatenate(outputs, axis=1), state

    def state_after(self, num_rows: int) -> mx.array:
        return self._states[num_rows]

    def states_after(
        self, num_rows: mx.array, one: slice, numbers: Collection[int]
    ) -> mx.array:
        first, *others = (self._states[number][one] for number in sorted(numbers))
        kept, state = num_rows[:, None, None, None], first
        for number, other in zip(sorted(numbers)[1:], others, strict=True):
            state = mx.where(kept == number, other, state)
        return state


def make_call(update: Any, args: Any, kwargs: Any) -> Call:
    """Make the call that takes rows back with the least work on the device in use."""
    has_kernel = mx.default_device() == mx.gpu and mx.metal.is_available()
    has_mask = len(args) > STATE_POSITION + 1 and args[STATE_POSITION + 1] is not None
    kind = Call if has_kernel or has_mask else CallByRow
    return kind(update, args, kwargs)


class Tape:
    """The inputs of one model's recurrent layers during one forward pass.

    Or, where the kernel runs, the states that the layers keep: ``rows``.
    """

    def __init__(self) -> None:
        self.conv_inputs: list[mx.array] = []
        self.rows: list[RowStates] = []
        self._calls: list[Call] = []

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
        is_replayable = len(self.conv_inputs) == len(self._calls) == num_layers
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
        recorded = zip(entries, self.conv_inputs, self._calls, strict=True)
        for entry, conv_input, call in recorded:
            # The input of the convolution is its state followed by the new rows.
            num_state_rows = conv_input.shape[1] - call.num_rows
            end = num_rows + num_state_rows
            entry[0] = mx.contiguous(conv_input[:, num_rows:end])
            entry[1] = call.state_after(num_rows)

    def replayed(
        self,
        num_rows: mx.array,
        one: slice = slice(None),
        numbers: Collection[int] | None = None,
    ) -> list[list[mx.array]]:
        """States of every layer after the first rows of the pass.

        Args:
            num_rows (mx.array): How many rows each sequence keeps.
            one (slice): Of which sequences.
            numbers (Collection[int], optional): No other number is in ``num_rows``.
                Default: any may be.
        """
        if self.rows:
            return [rows.taken(one, num_rows) for rows in self.rows]
        found = []
        for conv_input, call in zip(self.conv_inputs, self._calls, strict=True):
            num_state_rows = conv_input.shape[1] - call.num_rows
            places = num_rows[:, None] + mx.arange(num_state_rows)
            conv = mx.take_along_axis(conv_input[one], places[..., None], axis=1)
            possible = range(call.num_rows + 1) if numbers is None else set(numbers)
            found.append([conv, call.states_after(num_rows, one, possible)])
        return found

    def _record(self, update: Any, args: Any, kwargs: Any) -> Any:
        self._calls.append(make_call(update, args, kwargs))
        return self._calls[-1].run()


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
