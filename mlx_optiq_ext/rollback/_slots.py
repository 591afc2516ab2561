"""Where the rows of a pass stand in rings, and what each row sees there.

A ring has ``max_size`` slots. Rows fill them in order; once it is full, every row takes
the slot of the oldest one, save that the first ``keep`` slots are never taken again.
Sums depend on the order of what is summed, so a pass of several rows equals as many
passes of one only if each row reads the very slots that it would read then.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Attention = Callable[..., mx.array]


def advanced(index: int, num_rows: int, max_size: int, keep: int) -> int:
    """Compute the index of a ring after more rows, one past the last slot written.

    Args:
        index (int): The index before these rows.
        num_rows (int): How many rows are written.
        max_size (int): The number of slots of the ring.
        keep (int): The number of first slots that are never taken again.
    """
    index += num_rows
    if index <= max_size:
        return index
    return keep + (index - max_size - 1) % (max_size - keep) + 1


def rows_in_slots(
    slots: mx.array, index: mx.array, last_row: mx.array, max_size: int, keep: int
) -> mx.array:
    """Find the row of a pass that each slot holds; -1 means a row from before it.

    Args:
        slots (mx.array): The slots to look at, broadcastable to the other arrays.
        index (mx.array): The index of the ring before the pass.
        last_row (mx.array): The last row that is written; -1 means that none is.
        max_size (int): The number of slots of the ring.
        keep (int): The number of first slots that are never taken again.
    """
    period = max_size - keep
    first = slots - index
    first = mx.where(first < 0, first + period, first)
    latest = first + mx.maximum(last_row - first, 0) // period * period
    rows = mx.where(slots < keep, first, latest)
    # The pass does not write to a kept slot that was filled before.
    is_kept = (slots < keep) & (slots < index)
    return mx.where((first <= last_row) & ~is_kept, rows, -1)


class SlotViews:
    """The keys and values that each row of a pass sees in the slots of the ring.

    One object stands in for both arrays on the way to mlx-lm's attention, whose patch
    calls ``attend``.

    Args:
        keys (mx.array): The keys, by row of the pass and slot,
          ``[num_sequences, heads, num_rows, num_slots, head_dim]``.
        values (mx.array): The values, of the same shape but for the size of a head.
    """

    def __init__(self, keys: mx.array, values: mx.array):
        self._keys = keys
        self._values = values

    def attend(
        self,
        attention: Attention,
        queries: mx.array,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Let every row attend to its own view, as if the row were a head of its own.

        Args:
            attention (Callable): mlx-lm's ``scaled_dot_product_attention``.
            queries (mx.array): The queries,
              ``[num_sequences, query_heads, num_rows, head_dim]``.
            scale (float): The factor of the scores before the softmax.
            mask (mx.array, optional): The slots of its view that each row sees,
              broadcastable to ``[num_sequences, 1, num_rows, num_slots]``.
            sinks (mx.array, optional): The sink of each query head, ``[query_heads]``.

        Returns:
            mx.array: The output, ``[num_sequences, query_heads, num_rows, head_dim]``.
        """
        num_heads, num_rows = self._keys.shape[1:3]
        rows = _rows_as_heads(queries, num_heads)
        num_repeats = rows.shape[1] // (num_heads * num_rows)
        if mask is not None:
            mask = mx.repeat(mask, num_repeats, axis=-2)
            mask = mx.tile(mask, (1, num_heads, 1, 1)).reshape(
                mask.shape[0], rows.shape[1], 1, -1
            )
        if sinks is not None:
            by_head = sinks.reshape(num_heads, 1, num_repeats)
            sinks = mx.tile(by_head, (1, num_rows, 1)).flatten()
        output = attention(
            rows,
            self._keys.flatten(1, 2),
            self._values.flatten(1, 2),
            cache=None,
            scale=scale,
            mask=mask,
            sinks=sinks,
        )
        shape = queries.shape[0], num_heads, num_rows, num_repeats, -1
        output = output.reshape(shape).swapaxes(2, 3)
        return output.reshape(*queries.shape[:3], -1)


def _rows_as_heads(queries: mx.array, num_heads: int) -> mx.array:
    """Order queries as ``[num_sequences, heads * num_rows * repeats, 1, head_dim]``."""
    num_sequences, num_query_heads, num_rows, head_dim = queries.shape
    num_repeats = num_query_heads // num_heads
    shape = num_sequences, num_heads, num_repeats, num_rows, head_dim
    rows = queries.reshape(shape).swapaxes(2, 3)
    return rows.reshape(num_sequences, -1, 1, head_dim)
