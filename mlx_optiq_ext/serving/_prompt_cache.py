"""Keeps the caches of prompts that later requests may begin with.

An agent's requests are long and alike: each repeats the one before it and adds to it,
and between them come short ones about something else, a title or a summary. What is
kept is bounded by bytes, and what goes first is what is least likely to be asked for:

- caches of a model that is not served any more;
- those that a longer one of the same conversation has taken the place of. The end of a
  user's message is one that only the end of a later one replaces: there templates
  begin to leave out what was thought since;
- those that were not used for the longest time. Whoever uses a cache uses those of all
  its beginnings as well, to which it falls back when a prompt is rendered otherwise.

Invariant: a cache that is handed out holds exactly the tokens that are not in the rest,
and the rest is never empty, for a model needs a token to go on from.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..rollback import own_rows, share_rows

Key = array  # of int64

NO_LIMIT = 1 << 63  # bytes


@dataclass(eq=False)
class _Kept:
    """The cache of a prompt.

    Args:
        model: The key of the model.
        tokens: The tokens of the prompt.
        entries: mlx-lm's cache entries, one for each layer.
        kind: The part of a prompt that ends there: "system", "user", "assistant", ...
        last_use: When the cache was last used; a larger number is later.
        is_superseded: Whether a longer cache of this kind goes on from this one.
        host: The cache whose rows these entries look at, None if they have their own.
    """

    model: Any
    tokens: Key
    entries: list[Any]
    kind: str
    last_use: int = 0
    is_superseded: bool = False
    host: _Kept | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(entry.nbytes for entry in self.entries)

    def begins(self, other: _Kept) -> bool:
        """Whether the prompt of another one of the model goes on from this one's."""
        return (
            self.model == other.model
            and len(self.tokens) < len(other.tokens)
            and other.tokens[: len(self.tokens)] == self.tokens
        )

    def num_usable(self, tokens: Key) -> int:
        """How many tokens of a prompt need not be processed again."""
        num_common = common_length(self.tokens, tokens)
        if num_common < len(self.tokens) or num_common == len(tokens):
            is_trimmable = can_trim_prompt_cache(self.entries)
            return min(num_common, len(tokens) - 1) if is_trimmable else 0
        return num_common


class PromptCache:
    """Takes the place of mlx-lm's ``LRUPromptCache`` in its server.

    Args:
        max_size (int, optional): The number of caches, None for any number.
        max_bytes (int, optional): What they hold together. None: half of what else
          that is in memory leaves.
    """

    def __init__(self, max_size: int | None = None, max_bytes: int | None = None):
        self._max_size = max_size
        self._max_bytes = max_bytes
        self._kept: list[_Kept] = []
        self._clock = itertools.count(1)

    @classmethod
    def of(cls, cli_args: Any, *, is_distributed: bool = False) -> PromptCache:
        """With the limits that were asked for on the command line.

        Args:
            cli_args (Namespace): The server's command line.
            is_distributed (bool): Whether processes share the model. They have to keep
                the same prompts, so how much memory each has left must not count.
        """
        size = getattr(cli_args, "prompt_cache_size", None)
        max_bytes = getattr(cli_args, "prompt_cache_bytes", None)
        if is_distributed:
            return cls(size, NO_LIMIT if max_bytes is None else max_bytes)
        is_size_given = getattr(cli_args, "is_prompt_cache_size_given", True)
        return cls(size if is_size_given else None, max_bytes)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """The numbers of caches and bytes by kind."""
        nums = Counter(kept.kind for kept in self._kept)
        sizes = Counter[str]()
        for kept in self._kept:
            sizes[kept.kind] += kept.nbytes
        return {
            kind: {"n_sequences": nums[kind], "n_bytes": sizes[kind]} for kind in nums
        }

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """A copy of the cache that serves most of a prompt, and the rest of that."""
        key = Key("q", tokens)
        candidates = [
            (kept.num_usable(key), -len(kept.tokens), kept)
            for kept in self._kept
            if kept.model == model
        ]
        num_usable, _, kept = max(
            candidates, key=lambda each: each[:2], default=(0, 0, None)
        )
        if kept is None or num_usable == 0:
            return None, tokens
        self._use(kept)
        entries = copy.deepcopy(kept.entries)
        if num_surplus := len(kept.tokens) - num_usable:
            trim_prompt_cache(entries, num_surplus)
        return entries, tokens[num_usable:]

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep the cache of a prompt, as long as there is room."""
        new = _Kept(model, Key("q", tokens), prompt_cache, cache_type)
        same = (new.model, new.tokens)
        self._drop([k for k in self._kept if (k.model, k.tokens) == same], heir=new)
        self._take_place(new)
        self._kept.append(new)
        self._use(new)
        self.trim_to(n_sequences=self._max_size, n_bytes=self._limit())

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Drop what is least likely to be asked for until limits are kept."""
        latest = max(self._kept, key=lambda kept: kept.last_use, default=None)
        served = latest and latest.model
        order = sorted(
            self._kept,
            key=lambda k: (k.model == served, not k.is_superseded, k.last_use),
        )
        for kept in order:
            is_few = n_sequences is None or len(self) <= max(n_sequences, 0)
            if is_few and (n_bytes is None or self.nbytes <= max(n_bytes, 0)):
                return
            self._drop([kept])

    def _use(self, used: _Kept) -> None:
        now = next(self._clock)
        used.is_superseded = False
        for kept in self._kept:
            if kept is used or kept.begins(used):
                kept.last_use = now

    def _take_place(self, new: _Kept) -> None:
        """Settle what becomes of the beginnings of what is kept from now on."""
        beginnings = [kept for kept in self._kept if kept.begins(new)]
        if can_trim_prompt_cache(new.entries):
            self._drop(beginnings, heir=new)
            return
        for kept in beginnings:
            kept.is_superseded |= kept.kind in (new.kind, "assistant")
            if num_bytes := share_rows(kept.entries, new.entries):
                # The rows of an earlier host were counted as that host's.
                kept.nbytes -= num_bytes if kept.host is None else 0
                kept.host = new

    def _drop(self, dropped: Iterable[_Kept], heir: _Kept | None = None) -> None:
        gone = {id(kept) for kept in dropped}
        self._kept = [kept for kept in self._kept if id(kept) not in gone]
        for kept in self._kept:
            if kept.host is None or id(kept.host) not in gone:
                continue
            if heir is not None and share_rows(kept.entries, heir.entries):
                kept.host = heir
                continue
            own_rows(kept.entries)
            kept.host = None
            kept.nbytes = sum(entry.nbytes for entry in kept.entries)

    def _limit(self) -> int:
        if self._max_bytes is not None:
            return self._max_bytes
        others = max(mx.get_active_memory() - self.nbytes, 0)
        return max(_memory_size() - others, 0) // 2


def common_length(first: Key, second: Key) -> int:
    """The number of tokens with which both of two prompts begin."""
    num_common, step = 0, 64
    end = min(len(first), len(second))
    while num_common < end and step:
        until = min(num_common + step, end)
        if first[num_common:until] == second[num_common:until]:
            num_common, step = until, 2 * step
        else:
            step = (until - num_common) // 2
    return num_common


def _memory_size() -> int:
    """Bytes that the device can use well."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or mx.get_memory_limit())
