"""The head computes what its definition says, in any number of pieces."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from tests.heads.variants import DENSE, MOE, reference_head, unreadable


def pairs(num_tokens: int) -> tuple[mx.array, mx.array]:
    mx.random.seed(5)
    embeddings, hidden = mx.random.normal((2, 1, num_tokens, 64))
    return embeddings, hidden


@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_chunks_give_what_the_whole_gives(kind):
    head = reference_head(kind)
    embeddings, hidden = pairs(12)
    whole = head(embeddings, hidden)
    cache = KVCache()
    chunks = [
        head(embeddings[:, a:b], hidden[:, a:b], cache)
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    assert cache.offset == 12
    assert mx.abs(mx.concatenate(chunks, axis=1) - whole).max() < 2e-5


def test_a_row_sees_no_later_row():
    head = reference_head(DENSE)
    embeddings, hidden = pairs(8)
    changed = mx.concatenate([hidden[:, :5], hidden[:, 5:] + 1], axis=1)
    difference = mx.abs(head(embeddings, hidden) - head(embeddings, changed))
    assert difference[:, :5].max() < 1e-6
    assert difference[:, 5:].max() > 0.1


def test_filling_the_cache_computes_nothing_but_keys_and_values(tmp_path):
    head = reference_head(DENSE)
    attention, mlp = head.layers[0].self_attn, head.layers[0].mlp
    for module in (attention.q_proj, attention.o_proj, mlp.down_proj, head.norm):
        module.weight = unreadable(tmp_path, module.weight.shape)

    cache = KVCache()
    output = head(*pairs(6), cache)
    mx.eval(cache.state)
    assert cache.offset == 6
    with pytest.raises(RuntimeError):
        mx.eval(output)
