"""The kernel's draws against the definition of sampling: the same words bit for bit, the same tokens."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tts_engine.sampling import Sampling, philox, philox_key, sample_slowly
from tts_kernels import sample


@triton.jit
def _words(out, first, position, identities, keys, COUNTERS: tl.constexpr):
    counter = (first + tl.arange(0, COUNTERS)).to(tl.uint32)
    key_0, key_1 = tl.load(keys).to(tl.uint32, bitcast=True), tl.load(keys + 1).to(tl.uint32, bitcast=True)
    found = sample.words(counter, position.to(tl.uint32), tl.load(identities), key_0, key_1)
    tl.store(out + tl.arange(0, 4 * COUNTERS), found.to(tl.int32, bitcast=True))


def draws(count, seed=0):
    """keys, identities and positions of draws, their bits all over the range."""
    rng = np.random.default_rng(seed)
    keys = np.array([philox_key(int(i), f"p{i}") for i in range(count)], np.uint32)
    return keys, rng.integers(0, 2**64, count, np.uint64, endpoint=False), rng.integers(0, 5000, count)


def on_device(keys, identities, positions):
    return torch.from_numpy(keys.view(np.int32)), torch.from_numpy(identities.view(np.int64)), torch.from_numpy(positions)


def test_words_are_the_definitions_bit_for_bit():
    keys, identities, _ = draws(3)
    for key, identity in zip(keys, identities, strict=True):
        out = torch.empty(64, dtype=torch.int32)
        _words[(1,)](out, 37_000, 3_000_000_000, torch.from_numpy(identity[None].view(np.int64)),
                     torch.from_numpy(key.view(np.int32)), COUNTERS=16)  # fmt: skip
        counter = np.empty((16, 4), np.uint32)
        counter[:] = [0, 3_000_000_000, identity & 0xFFFFFFFF, identity >> np.uint64(32)]
        counter[:, 0] = np.arange(37_000, 37_016)
        assert np.array_equal(out.numpy().view(np.uint32), philox(counter, key).ravel())


@pytest.mark.parametrize("vocab", [3, 1024, 9001])
@pytest.mark.parametrize("temperature", [0.7, 5.0])
def test_tokens_are_the_definitions(vocab, temperature):
    logits = 3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1, : vocab // 2] = -torch.inf
    rows, given = np.array([0, 1, 1, 2, 3, 1]), draws(6, vocab)
    expected = sample_slowly(logits, rows, Sampling(temperature=temperature), *given)
    got = sample.sample(logits, torch.from_numpy(rows), *on_device(*given), temperature)
    assert got.tolist() == expected.tolist()


def test_of_equal_tokens_the_first_is_drawn():
    keys, identities, positions = draws(1)
    logits = torch.full((1, 20_000), 1e30)  # noise is lost beside it
    assert sample.sample(logits, torch.zeros(1, dtype=torch.int64), *on_device(keys, identities, positions), 1.0).tolist() == [0]
