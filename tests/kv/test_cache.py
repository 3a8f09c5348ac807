"""The pool of slots: what is kept when it changes its size, and what a failed change leaves."""

import numpy as np
import pytest
import torch

from tts_engine.kv.cache import KVCache


def numbered(num_blocks: int = 6) -> KVCache:
    """Every number in it is another one."""
    cache = KVCache(num_layers=3, num_blocks=num_blocks, block_size=2, num_kv_heads=2, head_dim=4, dtype=torch.float32)
    for i, table in enumerate(cache.tables):
        table.copy_(torch.arange(table.numel()).view_as(table) + 1000 * i)
    return cache


def blocks_of(cache: KVCache) -> list[torch.Tensor]:
    return [table.clone().view(cache.num_blocks, -1) for table in cache.tables]


@pytest.mark.parametrize("num_blocks", [4, 6, 9])
def test_what_moved_and_what_stays_is_there_in_another_size(num_blocks):
    cache = numbered()
    before = blocks_of(cache)
    cache.copy(np.array([[4, 1], [5, 0]], np.int32))
    cache.resize(num_blocks, used=4)
    assert (cache.num_blocks, cache.num_slots, cache.version) == (num_blocks, 2 * num_blocks, 1)
    assert cache.num_bytes == num_blocks * cache.block_bytes == sum(table.nbytes for table in cache.tables)
    for old, new in zip(before, blocks_of(cache), strict=True):
        assert torch.equal(new[:4], old[[5, 4, 2, 3]]) and not new[4:].any()


@pytest.mark.parametrize("fails_at", [0, 2, 5])
def test_a_size_that_cannot_be_had_leaves_all_as_it_was(monkeypatch, fails_at):
    cache = numbered()
    before, sized, calls = blocks_of(cache), KVCache._sized, iter(range(100))

    def failing(self, table, num_blocks, used):
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return sized(self, table, num_blocks, used)

    monkeypatch.setattr(KVCache, "_sized", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.resize(60, used=6)
    assert cache.num_blocks == 6 and cache.version == 1  # the tensors that came back are others
    assert all(torch.equal(old, new) for old, new in zip(before, blocks_of(cache), strict=True))
