"""per_branch against the definition, over mixed batches and poisoned slots, and how it cuts a batch into chunks."""

import random

import numpy as np
import pytest
import torch

from tts_engine.attention import make_backend, per_branch
from tts_engine.kv.cache import KVCache
from tts_engine.testing import flat_layout


def cases():
    """(name, lengths of the paths, new tokens of each)."""
    rng = random.Random(0)
    yield "one token", [1], [1]
    yield "decode", [rng.randint(1, 90) for _ in range(57)], [1] * 57
    yield "decode of one length", [16] * 9, [1] * 9
    yield "prefill", [1, 7, 63, 64, 65, 130], [1, 7, 63, 64, 65, 130]
    lengths = [rng.randint(20, 150) for _ in range(23)]
    yield "steps and decode", lengths, [rng.choice([1, 1, 5, 9, 17]) for _ in lengths]
    yield "long runs on long contexts", [300, 12, 200], [129, 12, 1]


@pytest.mark.parametrize(("lengths", "new"), [pytest.param(*c[1:], id=c[0]) for c in cases()])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 8), (4, 2, 32), (7, 1, 10), (16, 2, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_branch_agrees_with_reference(lengths, new, heads, kv_heads, dim, dtype):
    total = sum(lengths)
    gen = torch.Generator().manual_seed(total)
    free = random.Random(total).sample(range(1, total + 50), total)  # slot 0, which pads the layout, stays poisoned
    slots = [[free.pop() for _ in range(length)] for length in lengths]
    layout = flat_layout(slots, new)
    tokens = len(layout.positions)
    q, k, v = (torch.randn(tokens, n, dim, generator=gen).to(dtype) for n in (heads, kv_heads, kv_heads))
    outs = []
    for name in ("reference", "per_branch"):
        cache = KVCache(num_layers=1, num_blocks=total + 50, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
        for table in cache.tables:
            table.fill_(torch.nan)
        live = torch.tensor(sum(slots, []))
        past = torch.Generator().manual_seed(1)
        cache.k[0][live], cache.v[0][live] = (torch.randn(total, kv_heads, dim, generator=past).to(dtype) for _ in range(2))
        backend = make_backend(name)
        outs.append(backend.run(q, k, v, cache, 0, backend.plan(layout)))
    ref, out = outs
    assert out.dtype == dtype and not out.isnan().any()
    assert (out.float() - ref.float()).abs().max() <= (1e-6 if dtype == torch.float32 else 2**-7) * ref.float().abs().max()


def test_chunks_cover_each_new_token_once_and_bound_padding():
    rng = random.Random(3)
    lengths = [rng.randint(20, 200) for _ in range(700)]
    new = [rng.choice([1, 1, 1, 9, 14, 20]) for _ in lengths]
    lengths[0] = new[0] = 1000
    layout = flat_layout([range(length) for length in lengths], new)
    plan = make_backend("per_branch").plan(layout)
    covered = torch.cat([c.tokens if c.real is None else c.tokens[c.real] for c in plan.chunks])
    assert sorted(covered.tolist()) == list(range(sum(new)))
    for chunk in plan.chunks:
        items, _, queries, _, context = chunk.bias.shape
        assert items == 1 or items * context <= per_branch.MAX_SLOTS
        assert queries <= per_branch.MAX_QUERIES
    pairs = sum(sum(range(n - m + 1, n + 1)) for n, m in zip(lengths, new, strict=True))
    assert sum(c.bias.numel() for c in plan.chunks) <= 1.6 * pairs
    gathered = sum(c.slots.numel() for c in plan.chunks)
    assert gathered <= 1.2 * np.sum(lengths) + 16 * 600  # the long row is read once per piece of it
