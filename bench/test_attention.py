"""Attention of one layer at the shapes of a search: the definition and what runs in its place, in one table.

Run by `make bench`; compare rows of one group only, and only within one run.
"""

import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.kv.cache import KVCache
from tts_engine.testing import flat_layout

SHAPES = {  # rows, new tokens a row, context, heads, KV heads, head_dim
    "decode 64 rows": (64, 1, 100, 4, 2, 32),
    "decode 512 rows": (512, 1, 100, 4, 2, 32),
    "PRM 128 steps of 12": (128, 12, 100, 4, 2, 32),
}


@pytest.mark.parametrize("name", ["reference", "per_branch", "native"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark, shape, name):
    rows, new, context, heads, kv_heads, dim = SHAPES[shape]
    benchmark.group = shape
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(num_layers=1, num_blocks=rows, block_size=context, num_kv_heads=kv_heads, head_dim=dim, dtype=torch.float32)
    for table in cache.tables:
        table.normal_(generator=generator)
    layout = flat_layout([range(row * context, (row + 1) * context) for row in range(rows)], [new] * rows)
    q, k, v = (torch.randn(rows * new, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    backends = {n: make_backend(n) for n in ("reference", name)}
    ref, out = (b.run(q, k, v, cache, 0, b.plan(layout)) for b in (backends["reference"], backends[name]))
    assert torch.allclose(ref, out, atol=1e-5)
    plan = backends[name].plan(layout)
    benchmark(backends[name].run, q, k, v, cache, 0, plan)
