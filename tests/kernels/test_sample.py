"""The kernel's draws against the definition of sampling: the same words bit for bit, the same tokens."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tts_engine.sampling import Sampling, log_probabilities, philox, philox_key, sample_slowly
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


SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2),
    Sampling(temperature=5.0, top_k=2),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=0.9, min_p=0.3),
    Sampling(temperature=2.0, top_k=20, top_p=0.7),
    Sampling(temperature=1.0, top_k=10**6, top_p=0.05, min_p=1.0),
    Sampling(temperature=3.0, top_k=9, top_p=0.97, min_p=0.08),
]


def on_device_each(settings):
    """temperatures, top_k, top_p and min_p of draws, each with its own."""
    columns = zip(*((s.temperature, s.top_k, s.top_p, s.min_p) for s in settings), strict=True)
    dtypes = torch.float32, torch.int32, torch.float32, torch.float32
    return [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]


def expected_tokens(logits, rows, settings, given):
    keys, identities, positions = given
    one = [slice(i, i + 1) for i in range(len(rows))]
    return [sample_slowly(logits, rows[i], s, keys[i], identities[i], positions[i])[0] for i, s in zip(one, settings, strict=True)]


def poisoned(num_draws, vocab):
    """Outputs and workspace that hold no number yet."""
    logprobs, partial = torch.full((num_draws,), torch.nan), torch.full((5, num_draws, sample.num_pieces(vocab)), torch.nan)
    return {"tokens": torch.full((num_draws,), -7), "logprobs": logprobs, "partial": partial}


@pytest.mark.parametrize(
    ("vocab", "spread", "dtype"),
    [
        (3, 1, torch.float32),
        (1024, 0, torch.float32),
        (1025, 8, torch.float16),
        (9001, 2, torch.bfloat16),
        (40_003, 4, torch.float16),
    ],
    ids=str,
)
def test_draws_with_settings_of_their_own_are_the_definitions(vocab, spread, dtype):
    """From flat logits, where all are equal, to peaked ones; equal ones by rounding; holes, shared rows, and what is nobody's."""
    stored = torch.full((5, vocab + 5), torch.nan, dtype=dtype)
    logits = stored[:, :vocab]
    logits[:4] = (spread * torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    logits[1, : vocab // 2] = -torch.inf
    settings = SETTINGS if vocab < 10_000 else [Sampling(temperature=1.0, top_k=50, top_p=0.9)]
    rows, given = np.array([0, 1, 1, 2, 3, 1, 0, 2])[: len(settings)], draws(len(settings), vocab)
    expected = expected_tokens(logits.float(), rows, settings, given)
    out = poisoned(len(rows), vocab)
    got = sample.sample(logits, torch.from_numpy(rows), *on_device(*given), *on_device_each(settings), **out)
    assert got is out["tokens"] and got.tolist() == expected
    ref = log_probabilities(logits[:4].float(), rows, np.array(expected))
    np.testing.assert_allclose(out["logprobs"], ref, atol=2e-5, rtol=1e-6)


def test_temperatures_alone_need_no_limits():
    logits, given = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)), draws(4)
    rows, settings = np.array([1, 0, 1, 1]), [Sampling(temperature=t) for t in (0.0, 0.5, 1.0, 3.0)]
    got = sample.sample(logits, torch.from_numpy(rows), *on_device(*given), on_device_each(settings)[0])
    assert got.tolist() == expected_tokens(logits, rows, settings, given)


def test_of_equal_tokens_the_first_is_drawn():
    keys, identities, positions = draws(1)
    logits = torch.full((1, 20_000), 1e30)  # noise is lost beside it
    given = torch.zeros(1, dtype=torch.int64), *on_device(keys, identities, positions), torch.ones(1)
    assert sample.sample(logits, *given).tolist() == [0]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.5}, 4), ({"top_p": 0.51}, 5), ({"top_k": 6, "top_p": 0.5}, 3), ({"min_p": 1.0}, 8)],
    ids=str,
)
def test_of_equal_tokens_the_first_stay(limits, kept):
    count = 24
    logits, settings = torch.tensor([[0.0, -0.0] * 4 + [-1e30]]), [Sampling(temperature=1.0, **limits)] * count
    given = torch.zeros(count, dtype=torch.int64), *on_device(*draws(count, kept)), *on_device_each(settings)
    assert set(sample.sample(logits, *given).tolist()) == set(range(kept))


def test_no_token_is_drawn_from_a_row_that_is_broken():
    logits = torch.randn(5, 1500, generator=torch.Generator().manual_seed(1))
    logits[0, 7], logits[1, 1400], logits[2] = torch.nan, torch.inf, -torch.inf
    settings = [Sampling(temperature=t, top_p=0.5) for t in (0.0, 1.0)] * 4
    rows, given = np.array([0, 0, 1, 1, 2, 2, 4, 4]), draws(8)
    out = poisoned(8, 1500)
    got = sample.sample(logits, torch.from_numpy(rows), *on_device(*given), *on_device_each(settings), **out).tolist()
    assert got == expected_tokens(logits, rows, settings, given) and got[:6] == [-1] * 6 and min(got[6:]) >= 0
    assert out["logprobs"].isnan().tolist() == [True] * 6 + [False] * 2


def test_no_draw_is_no_token():
    nobody = torch.zeros(0, dtype=torch.int64)
    keys = torch.zeros(0, 2, dtype=torch.int32)
    assert sample.sample(torch.zeros(1, 9), nobody, keys, nobody, nobody, torch.zeros(0)).shape == (0,)
