"""Rotation and append in one kernel, against the decoder's rotation and the cache's own writing."""

import pytest
import torch

from tts_engine.kv.cache import KVCache
from tts_engine.models.ops import TorchOps
from tts_kernels.store_kv import store_kv


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 16), (7, 1, 32), (4, 4, 64), (2, 1, 10), (0, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_are_turned_and_keys_and_values_lie_in_their_slots(heads, kv_heads, dim, dtype, normed):
    gen = torch.Generator().manual_seed(heads)
    qkv = torch.randn(5, heads + 2 * kv_heads + 1, dim, generator=gen).to(dtype)[:, :-1]  # a slice, as of a wider matrix
    angles = 9 * torch.randn(5, dim // 2, generator=gen)
    slots = torch.tensor([6, 0, 3, 8, 2])
    caches = [KVCache(num_layers=1, num_blocks=10, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype) for _ in "ab"]
    norm = torch.randn(heads + kv_heads, dim, generator=gen).to(dtype) if normed else None
    q = store_kv(qkv, angles.cos(), angles.sin(), slots, caches[0].k[0], caches[0].v[0], norm=norm, epsilon=1e-5)
    turned = qkv[:, : heads + kv_heads]
    turned = turned if norm is None else TorchOps().norm(turned, norm, 1e-5)
    turned = TorchOps().rotate(turned.float(), angles.cos(), angles.sin()).to(dtype)
    caches[1].write(0, slots, turned[:, heads:], qkv[:, heads + kv_heads :])
    close = {"atol": 2e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-3 if normed else 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(q, turned[:, :heads], **close)
    torch.testing.assert_close(caches[0].k, caches[1].k, **close)
    assert torch.equal(caches[0].v[0], caches[1].v[0])  # and no other slot was touched in either


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
def test_queries_alone_are_turned_and_nothing_is_stored(normed):
    gen = torch.Generator().manual_seed(0)
    q, norm, angles = (torch.randn(*shape, generator=gen) for shape in ((5, 3, 10), (3, 10), (5, 5)))
    out = store_kv(q, angles.cos(), angles.sin(), norm=norm if normed else None, epsilon=1e-5)
    ref = TorchOps().turn(q, norm if normed else None, 1e-5, angles.cos(), angles.sin())
    torch.testing.assert_close(out, ref, atol=2e-6, rtol=1e-6)
    assert store_kv(q[:0], angles[:0].cos(), angles[:0].sin()).shape == (0, 3, 10)
