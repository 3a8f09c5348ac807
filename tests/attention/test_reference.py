"""The definition, against the formula in float64, and the independence its callers count on."""

import random

import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.kv.cache import KVCache
from tts_engine.testing import flat_layout


def poisoned(num_slots, kv_heads, dim, dtype=torch.float32):
    cache = KVCache(num_layers=2, num_blocks=num_slots, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
    for table in cache.tables:
        table.fill_(torch.nan)
    return cache


def attend_all(backend, slots, new, q, k, v, cache, window=None):
    """Tokens of all paths share k, v [slots, K, D] and q [slots, H, D], indexed by slot."""
    layout = flat_layout(slots, new)
    at = torch.from_numpy(layout.write_slots)
    return backend.run(q[at], k[at], v[at], cache, 1, backend.plan(layout), window), at


def softmax_attention(q, k, v):
    """q [H, D] over k, v [C, K, D] in float64."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    weights = torch.einsum("hd,chd->hc", q.double(), k).div(q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hc,chd->hd", weights, v)


@pytest.mark.parametrize("window", [None, 1, 5, 22, 23])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 8), (6, 2, 10), (7, 1, 32), (12, 2, 6)])
def test_reference_is_softmax_of_scaled_scores_times_values(heads, kv_heads, dim, window):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(64, n, dim, generator=gen) for n in (heads, kv_heads, kv_heads))
    path = random.Random(0).sample(range(64), 23)
    out, _ = attend_all(make_backend("reference"), [path], [23], q, k, v, poisoned(64, kv_heads, dim), window)
    seen = [path[max(0, i + 1 - (window or 23)) : i + 1] for i in range(23)]
    ref = torch.stack([softmax_attention(q[path[i]], k[seen[i]], v[seen[i]]) for i in range(23)])
    assert (out - ref).abs().max() <= 1e-6 * ref.abs().max()


def test_reference_bits_are_the_same_alone_in_company_in_a_run_and_one_by_one():
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(200, n, 32, generator=gen) for n in (7, 1, 1))
    free = random.Random(1).sample(range(200), 130)
    path, other = free[:61], free[61:]
    backend = make_backend("reference")
    alone, _ = attend_all(backend, [path], [61], q, k, v, poisoned(200, 1, 32))
    company, _ = attend_all(backend, [other, path], [len(other), 61], q, k, v, poisoned(200, 1, 32))
    cache, steps = poisoned(200, 1, 32), []
    for i in range(61):
        steps.append(attend_all(backend, [path[: i + 1]], [1], q, k, v, cache)[0])
    assert torch.equal(company[len(other) :], alone)
    assert torch.equal(torch.cat(steps), alone)
