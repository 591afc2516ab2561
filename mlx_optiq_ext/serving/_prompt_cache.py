"""The prompt cache as a server uses it."""

from __future__ import annotations

from typing import Any

import wrapt


class ServedPromptCache(wrapt.ObjectProxy):
    """A prompt cache that always leaves a token of the prompt to go on from.

    mlx-lm's cache returns the whole of a prompt that it has seen, for callers who know
    what follows. Its server does not: the generation thread would die of an empty rest.
    """

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """The cache of the longest known prefix, and the tokens after it.

        Args:
            model: The key of the model.
            tokens (list[int]): Of the prompt.

        Returns:
            tuple: The cache, None if nothing is known, and at least the last token.
        """
        fetch = self.__wrapped__.fetch_nearest_cache
        cache, rest = fetch(model, tokens)
        if rest or not tokens:
            return cache, rest
        cache, rest = fetch(model, tokens[:-1])
        return cache, [*rest, tokens[-1]]
