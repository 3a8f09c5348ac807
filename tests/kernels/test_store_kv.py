"""Rotation and append in one kernel, against the decoder's rotation and the cache's own writing."""

import pytest
import torch

from tts_engine.kv.cache import KVCache
from tts_engine.models.ops import TorchOps
from tts_kernels.store_kv import store_kv


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 16), (7, 1, 32), (4, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_are_turned_and_keys_and_values_lie_in_their_slots(heads, kv_heads, dim, dtype):
    gen = torch.Generator().manual_seed(heads)
    qkv = torch.randn(5, heads + 2 * kv_heads + 1, dim, generator=gen).to(dtype)[:, :-1]  # a slice, as of a wider matrix
    angles = 9 * torch.randn(5, dim // 2, generator=gen)
    slots = torch.tensor([6, 0, 3, 8, 2])
    caches = [KVCache(num_layers=1, num_blocks=10, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype) for _ in "ab"]
    q = store_kv(qkv, angles.cos(), angles.sin(), slots, caches[0].k[0], caches[0].v[0])
    turned = TorchOps().rotate(qkv[:, : heads + kv_heads].float(), angles.cos(), angles.sin()).to(dtype)
    caches[1].write(0, slots, turned[:, heads:], qkv[:, heads + kv_heads :])
    close = {"atol": 2e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(q, turned[:, :heads], **close)
    torch.testing.assert_close(caches[0].k, caches[1].k, **close)
    assert torch.equal(caches[0].v, caches[1].v)  # and no other slot was touched in either
