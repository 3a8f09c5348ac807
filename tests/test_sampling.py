"""Random numbers against their published answers, and what is drawn with them."""

import numpy as np
import pytest
import torch

from tts_engine import sampling as module
from tts_engine.sampling import Sampling, gumbel, log_probabilities, philox, philox_key, sample, sample_slowly

KEY = np.array([[1, 2]], np.uint32)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def noise(identity: int, position: int = 0, key: np.ndarray = KEY, vocab_size: int = 37) -> np.ndarray:
    return gumbel(key, np.array([identity], np.uint64), np.array([position]), vocab_size)[0]


def draw(logits: torch.Tensor, sampling: Sampling, count: int, start: int = 0) -> np.ndarray:
    """`count` draws of different identities from one row of logits."""
    identities = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return sample(logits, np.zeros(count, np.int64), sampling, np.repeat(KEY, count, axis=0), identities, np.full(count, 5))


@pytest.mark.parametrize(
    ("counter", "key", "known"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, known):
    np.testing.assert_array_equal(philox(words(counter), words(key)), words(known))


def test_the_counter_is_block_of_four_tokens_then_position_then_identity():
    identity, position, vocab_size = 0x0123456789ABCDEF, 77, 10
    ref = []
    for token in range(vocab_size):
        counter = np.array([token // 4, position, identity & 0xFFFFFFFF, identity >> 32], np.uint32)
        uniform = (int(philox(counter, KEY[0])[token % 4]) + 0.5) / 2**32
        ref.append(-np.log(-np.log(uniform)))
    np.testing.assert_array_equal(noise(identity, position, vocab_size=vocab_size), np.array(ref, np.float32))


def test_noise_does_not_depend_on_the_batch_it_is_made_in():
    identities, positions = np.array([3, 2**63 + 1, 9], np.uint64), np.array([0, 5, 123])
    keys = np.array([[1, 2], [3, 4], [5, 6]], np.uint32)
    together = gumbel(keys, identities, positions, 41)
    for i in range(3):
        np.testing.assert_array_equal(gumbel(keys[i : i + 1], identities[i : i + 1], positions[i : i + 1], 41)[0], together[i])
    np.testing.assert_array_equal(gumbel(keys[::-1], identities[::-1], positions[::-1], 41), together[::-1])
    np.testing.assert_array_equal(gumbel(keys, identities, positions, 40), together[:, :40])


def test_any_other_identity_position_or_key_draws_other_numbers():
    other_keys = [noise(1, key=KEY + np.uint32(1)), noise(1, key=KEY[:, ::-1])]
    rows = [noise(1), noise(2), noise(1 + 2**32), noise(1, position=1), *other_keys]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert not np.intersect1d(one, other).size


def test_a_problem_and_a_seed_have_a_key_of_their_own():
    keys = [philox_key(seed, problem) for seed in range(3) for problem in ("a", "b", "1/a")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word < 2**32 for key in keys for word in key)


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_a_uniform_is_never_0_or_1_so_noise_is_finite(monkeypatch, word):
    monkeypatch.setattr("tts_engine.sampling.philox", lambda counter, key: np.full(counter.shape, word, np.uint32))
    out = noise(1)
    assert np.isfinite(out).all()
    assert out[0] == pytest.approx(-np.log(33 * np.log(2)) if word == 0 else 33 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.4, 0.7, 1.0, 2.5])
def test_tokens_come_as_often_as_softmax_says(temperature):
    logits = torch.randn(1, 17, generator=torch.Generator().manual_seed(0))
    count = 20_000
    expected = count * (logits[0].double() / temperature).softmax(-1).numpy()
    seen = np.bincount(draw(logits, Sampling(temperature=temperature), count), minlength=17)
    likely = expected > 5
    rare = ~likely
    statistic = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < 39.3  # chi-square with 16 degrees of freedom exceeds this once in a thousand
    assert seen[rare].sum() <= expected[rare].sum() + 5 * np.sqrt(expected[rare].sum()) + 1


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.randn(9, 33, generator=torch.Generator().manual_seed(1))
    rows = np.array([3, 0, 8, 8, 1])
    for draw_tokens in (sample, sample_slowly):
        out = draw_tokens(logits, rows, Sampling(temperature=0.0), np.repeat(KEY, 5, axis=0), np.arange(5, dtype=np.uint64), rows)
        np.testing.assert_array_equal(out, logits.argmax(-1).numpy()[rows])


@pytest.mark.parametrize("vocab_size", [1, 3, 63, 64, 65, 130, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 40.0])
def test_the_fast_sampler_draws_what_the_definition_draws(vocab_size, spread):
    """Flat logits, where every token may win, to peaked ones; holes and shared rows; any temperature, threads, restriction."""
    gen, rng = torch.Generator().manual_seed(vocab_size), np.random.default_rng(vocab_size)
    logits = spread * torch.randn(7, vocab_size, generator=gen)
    logits[:3, 1::3] = -torch.inf
    rows = rng.integers(7, size=60)
    keys, identities = rng.integers(2**32, size=(60, 2), dtype=np.uint32), rng.integers(2**63, size=60).astype(np.uint64)
    positions = rng.integers(5000, size=60)
    before = torch.get_num_threads()
    for number, temperature in enumerate((0.05, 0.7, 1.0, 3.0)):
        for limits in ({}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}):
            sampling = Sampling(temperature=temperature, **limits)
            torch.set_num_threads(1 + number)
            try:
                out = sample(logits, rows, sampling, keys, identities, positions)
            finally:
                torch.set_num_threads(before)
            np.testing.assert_array_equal(out, sample_slowly(logits, rows, sampling, keys, identities, positions))


def test_columns_may_be_views_and_of_other_integers():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    rows, keys, numbers = np.arange(5), np.tile(np.array([[7, 8]], np.uint32), (5, 1)), np.arange(9, 14)
    given = Sampling(temperature=0.7), keys, numbers.astype(np.uint64), numbers
    views = Sampling(temperature=0.7), np.broadcast_to(keys[0], (5, 2)), numbers.astype(np.int32), np.repeat(numbers, 2)[::2]
    assert sample(logits, rows, *given).tolist() == sample(logits, rows.astype(np.int32), *views).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (5, 0.8, 0.0), (3, 0.95, 0.0), (50, 1.0, 0.0), (0, 1.0, 0.2),
     (0, 1.0, 1.0), (6, 1.0, 0.1), (0, 0.7, 0.05), (7, 0.9, 0.3)],
)  # fmt: skip
def test_top_k_then_top_p_then_min_p_leave_exactly_the_tokens_that_transformers_leaves(top_k, top_p, min_p):
    """And those come as often as a softmax over them says."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(1, 23, generator=torch.Generator().manual_seed(2))
    left, count = logits / 0.7, 20_000
    if top_k:
        left = TopKLogitsWarper(top_k)(None, left)
    left = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(top_p)(None, left))
    tokens = draw(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p), count)
    expected, seen = count * left[0].double().softmax(-1).numpy(), np.bincount(tokens, minlength=23)
    likely = expected > 20
    assert not seen[expected == 0].any() and seen[likely].all()
    assert ((seen - expected)[likely] ** 2 / expected[likely]).sum() < 48.3  # 22 degrees of freedom: once in a thousand


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, 4),  # 4 of 8 have it all
        ({"top_p": 0.51}, 5),
        ({"top_k": 6, "top_p": 0.5}, 3),  # of the 6 that were left
        ({"top_p": 0.5, "min_p": 1.0}, 4),
        ({"min_p": 1.0}, 8),
    ],
    ids=str,
)
def test_of_equal_tokens_the_first_stay(limits, kept):
    logits = torch.tensor([[-1e30] + [0.0, -0.0] * 4])  # and numbers that are equal count as equal, whatever their sign
    assert set(draw(logits, Sampling(temperature=1.0, **limits), 300)) == set(range(1, kept + 1))


@pytest.mark.parametrize("limits", [{}, {"top_k": 30, "top_p": 0.8, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_gpu_draws_what_the_definition_draws(temperature, limits):
    """Its kernels interpreted, in one go for all rows."""
    pytest.importorskip("triton")
    logits, rows = 2 * torch.randn(3, 140, generator=torch.Generator().manual_seed(5)), np.array([2, 0, 2, 1])
    logits[1, 3] = torch.nan
    given = np.tile(KEY + np.uint32(2**31), (4, 1)), np.array([5, 2**63 + 7, 1, 0], np.uint64), np.array([0, 9, 4000, 7])
    settings = Sampling(temperature=temperature, **limits)
    columns = [np.ascontiguousarray(x, dtype) for x, dtype in zip((rows, *given), module.DRAW_DTYPES, strict=True)]
    out = module._sample_on_gpu(logits, settings, columns)
    assert out.dtype == np.int64 and out[3] == -1
    np.testing.assert_array_equal(out, sample_slowly(logits, rows, settings, *given))


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]], ids=str)
def test_no_token_is_drawn_from_a_row_that_is_broken(broken, temperature, limits):
    logits = torch.zeros(2, 90)
    logits[1, 5:7], logits[1, 7:] = torch.tensor(broken), broken[-1]
    logits[1, :5] = broken[-1]
    given = np.repeat(KEY, 3, axis=0), np.arange(3, dtype=np.uint64), np.arange(3)
    for draw_tokens in (sample, sample_slowly):
        out = draw_tokens(logits, np.array([1, 0, 1]), Sampling(temperature=temperature, **limits), *given)
        assert out[0] == out[2] == -1 and 0 <= out[1] < 90


def test_a_log_probability_is_of_the_whole_vocabulary_at_temperature_1():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, -torch.inf, 0.0]])
    out = log_probabilities(logits, np.array([0, 1, 1, 0]), np.array([2, 0, 1, -1]))
    ref = [2 - np.log(1 + np.e + np.e**2), np.log(0.5), -np.inf, np.nan]
    np.testing.assert_allclose(out, np.array(ref, np.float32), rtol=1e-6)
    assert out.dtype == np.float32


def test_restricting_changes_a_draw_only_where_its_token_was_ruled_out():
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(3))
    free = draw(logits, Sampling(temperature=1.0), 500)
    narrow = draw(logits, Sampling(temperature=1.0, top_k=4), 500)
    kept = np.isin(free, logits[0].topk(4).indices.numpy())
    assert kept.any() and not kept.all()
    np.testing.assert_array_equal(narrow[kept], free[kept])


@pytest.mark.parametrize("setting", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
                                     {"temperature": 1.0, "top_k": -1}, {"temperature": 1.0, "top_p": 0.0},
                                     {"temperature": 1.0, "top_p": 1.1}, {"temperature": 1.0, "min_p": -0.1},
                                     {"temperature": 1.0, "min_p": float("nan")}], ids=str)  # fmt: skip
def test_senseless_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"{list(setting)[-1]}="):
        Sampling(**setting)
