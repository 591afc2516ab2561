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

# Whether rows of the pass under way may be taken back.
rows_are_apart: ContextVar[bool] = ContextVar("rows_are_apart", default=False)

LATENT_ATTENTION = "embed_q"  # a layer that only this kind of attention has


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
        x (mx.array): Shape ``[1, num_rows, hidden]``.
        mask (Any): That of several rows, which is not used.
        cache (Any): The entry.
        attn_scale (mx.array, optional): Factors of the queries, ``[num_rows, 1]``.
    """
    num_rows, options = x.shape[1], {}
    if type(cache) is not KVCache:
        each = [attention(x[:, row : row + 1], None, cache) for row in range(num_rows)]
        return mx.concatenate(each, axis=1)
    if attn_scale is not None:
        options["attn_scale"] = attn_scale.reshape(num_rows, 1, 1, 1)
    # Each row is the only one of a sequence of its own.
    rows = _RowsOfOne(cache, num_rows)
    found = attention(x.swapaxes(0, 1), mask=rows.mask, cache=rows, **options)
    return found.swapaxes(0, 1)


class _RowsOfOne:
    """An entry in which each row of a pass is a sequence with what is before it.

    Args:
        entry (KVCache): That of the sequence which they are rows of.
        num_rows (int): How many rows the pass has.
    """

    def __init__(self, entry: KVCache, num_rows: int):
        self._entry = entry
        self.offset = mx.arange(entry.offset, entry.offset + num_rows)

    @property
    def mask(self) -> mx.array:
        """What each row sees, ``[num_rows, 1, 1, num_tokens]``."""
        num_tokens = self._entry.offset + self.offset.size
        return mx.arange(num_tokens) <= self.offset[:, None, None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = self._entry.update_and_fetch(
            keys.transpose(2, 1, 0, 3), values.transpose(2, 1, 0, 3)
        )
        num_rows = self.offset.size
        return tuple(mx.broadcast_to(x, (num_rows, *x.shape[1:])) for x in fetched)


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
