from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, LRUPromptCache

from mlx_optiq_ext.serving._prompt_cache import ServedPromptCache


def untrimmable(value: int) -> list[ArraysCache]:
    cache = ArraysCache(1)
    cache[0] = mx.array([value])
    return [cache]


def test_a_token_is_left_to_go_on_from() -> None:
    cache = LRUPromptCache()
    served = ServedPromptCache(cache)
    served.insert_cache("model", [1, 2, 3], untrimmable(3))
    assert served.fetch_nearest_cache("model", [1, 2, 3]) == (None, [1, 2, 3])
    served.insert_cache("model", [1, 2], untrimmable(2))
    found, rest = served.fetch_nearest_cache("model", [1, 2, 3])
    assert found is not None
    assert found[0][0].item() == 2
    assert rest == [3]
    assert served.fetch_nearest_cache("model", [1, 2, 3, 4])[1] == [4]
    assert len(served) == len(cache) == 2


def test_other_users_of_the_class_find_what_they_put_in() -> None:
    cache = LRUPromptCache()
    cache.insert_cache("model", [1, 2, 3], untrimmable(3))
    found, rest = cache.fetch_nearest_cache("model", [1, 2, 3])
    assert found is not None
    assert found[0][0].item() == 3
    assert rest == []
