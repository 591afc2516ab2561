"""Rows of one pass, computed as plain decoding computes them one at a time.

Most layers of mlx-lm treat the rows of a pass alike, however many there are. Two kinds
have another formula for several rows, with other sums in it: multi-head latent
attention, and the recurrence of Mamba-2. Within a transaction they use the formula of
one row for each row. That is also faster where the context is long, because the other
formula of latent attention expands the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ._sequences import BatchKV

# Whether rows of the pass under way may be taken back.
rows_are_apart: ContextVar[bool] = ContextVar("rows_are_apart", default=False)


@contextmanager
def apart() -> Iterator[None]:
    """Until the end of the context, each row is computed as if it came alone."""
    token = rows_are_apart.set(True)
    try:
        yield
    finally:
        rows_are_apart.reset(token)


def attend_apart(
    attention: Callable[..., mx.array],
    x: mx.array,
    mask: Any = None,
    cache: Any = None,
    attn_scale: mx.array | None = None,
) -> mx.array:
    """Run latent attention over rows as if each came alone.

    Args:
        attention (Callable): Of mlx-lm, with the parameters of this function.
        x (mx.array): Shape ``[num_sequences, num_rows, hidden]``.
        mask (Any): That of several rows, which is not used.
        cache (Any): The entry.
        attn_scale (mx.array, optional): Factors of the queries, ``[num_rows, 1]``.
    """
    num_sequences, num_rows, size = x.shape
    if type(cache) not in (KVCache, BatchKV):
        each = [attention(x[:, row : row + 1], None, cache) for row in range(num_rows)]
        return mx.concatenate(each, axis=1)
    # Each row is the only one of a sequence of its own.
    entry, options = _RowsAsSequences(cache, num_sequences, num_rows), {}
    if attn_scale is not None:
        scales = mx.broadcast_to(attn_scale, (num_sequences, 1, num_rows, 1))
        options["attn_scale"] = scales.reshape(-1, 1, 1, 1)
    rows = x.reshape(-1, 1, size)
    found = attention(rows, mask=entry.mask, cache=entry, **options)
    return found.reshape(x.shape)


class _RowsAsSequences:
    """An entry in which each row of a pass is a sequence with what is before it.

    Args:
        entry (KVCache or BatchKV): That of the sequences which they are rows of.
        num_sequences (int): How many sequences the pass has.
        num_rows (int): How many rows each of them has.
    """

    def __init__(self, entry: Any, num_sequences: int, num_rows: int):
        self._entry = entry
        self._shape = num_sequences, num_rows
        offsets = mx.array(entry.offset).reshape(-1, 1) + mx.arange(num_rows)
        self.offset = offsets.flatten()

    @property
    def mask(self) -> mx.array:
        """What each row sees, ``[num_sequences * num_rows, 1, 1, num_tokens]``."""
        mask = self._entry.make_mask(
            self._shape[1], return_array=True, window_size=None
        )
        mask = mx.broadcast_to(mask, (self._shape[0], 1, *mask.shape[-2:]))
        return mask.reshape(-1, 1, 1, mask.shape[-1])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = self._entry.update_and_fetch(
            *(
                x.reshape(*self._shape, *x.shape[1:]).squeeze(3).swapaxes(1, 2)
                for x in (keys, values)
            )
        )
        return tuple(map(self._repeated, fetched))

    def _repeated(self, rows: mx.array) -> mx.array:
        """Keys or values, once for each row of the pass."""
        num_sequences, num_rows = self._shape
        if num_sequences == 1:
            return mx.broadcast_to(rows, (num_rows, *rows.shape[1:]))
        return mx.repeat(rows, num_rows, axis=0)


def update_in_order(
    update: Callable[..., tuple[mx.array, mx.array]],
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the recurrence of Mamba-2 row after row; the parameters are mlx-lm's."""
    outputs = []
    for row in range(hidden_states.shape[1]):
        x, b, c, step = (each[:, row : row + 1] for each in (hidden_states, B, C, dt))
        shown = None if mask is None else mask[:, row : row + 1]
        output, state = update(
            x, A_log, b, c, D, step, dt_bias, state, time_step_limit, shown, lengths
        )
        outputs.append(output)
    assert state is not None
    return mx.concatenate(outputs, axis=1), state
