import numpy as np
import pytest

from tts_engine.report.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # z^2 / (n + z^2) with z^2 = 3.8415
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_by_hand(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_takes_its_z_from_the_confidence():
    # z = 1.6449 at 90 %: centre (0.5 + z^2/20) / (1 + z^2/10) = 0.5, half z sqrt(0.025 + z^2/400) / (1 + z^2/10)
    assert wilson(5, 10, 0.90) == pytest.approx((0.2693, 0.7307), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_share(successes, trials):
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, trials)


def test_a_paired_difference_is_the_mean_and_reruns_the_same():
    first, second = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    out = paired_difference(first, second)
    assert out == paired_difference(first, second)
    # 20 of 100 pairs won, none lost: the difference is a share, whose percentiles a normal curve gives within a point or two
    assert out[0] == pytest.approx(0.20) and out[1:] == pytest.approx((0.12, 0.28), abs=0.015)


def test_counting_pairs_resamples_like_choosing_problems():
    rng = np.random.default_rng(1)
    first, second = rng.random(80) < 0.6, rng.random(80) < 0.4
    chosen = rng.integers(80, size=(10_000, 80))
    ref = np.quantile((first[chosen].astype(float) - second[chosen]).mean(1), [0.025, 0.975])
    _, *out = paired_difference(list(first), list(second))
    assert out == pytest.approx(ref, abs=0.02)


def test_no_difference_has_no_width():
    assert paired_difference([True, False], [True, False]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_what_is_not_paired_is_refused(first, second):
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference(first, second)
