from statistics import NormalDist

import numpy as np
import pytest

from tts_engine.report import intervals
from tts_engine.report.intervals import bootstrap, holm, paired_difference, verdicts, wilson


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


def test_resampling_by_counts_is_choosing_problems():
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


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="no problem"):
        bootstrap([])


def test_every_resample_of_three_problems_comes_as_often_as_it_should():
    """0, 0 and 3: a resample holds the 3 k times with probability C(3, k) (1/3)^k (2/3)^(3-k), and its mean is then k."""
    out = bootstrap([0.0, 0.0, 3.0])
    shares = [np.mean(np.isclose(out.resampled, k)) for k in range(4)]
    assert out.estimate == 1.0 and shares == pytest.approx([8 / 27, 12 / 27, 6 / 27, 1 / 27], abs=0.015)
    # half of the 12/27 at 1 and the 8/27 below it: the median is at z(14/27); the skewness of the three influences, over 6
    assert out.bias == pytest.approx(NormalDist().inv_cdf(14 / 27), abs=0.03)
    assert out.acceleration == pytest.approx((-1 - 1 + 8) / (6 * 6**1.5))


def test_a_ratio_is_of_the_means_and_costs_more_where_the_rare_problem_is_drawn():
    costs = np.array([[1.0, 1.0]] * 19 + [[21.0, 1.0]])
    out = bootstrap(costs, of=lambda means: means[..., 0] / means[..., 1])
    assert out.estimate == 2.0 and set(out.resampled) <= {1.0 + k for k in range(20)}
    percentile = np.quantile(out.resampled, [0.025, 0.975])
    low, high = out.interval()
    assert low >= percentile[0] == 1.0 and high > percentile[1]  # moved to where the values trail off


DRAWS = {
    "wins and losses": (lambda rng, size: rng.choice([1.0, 0.0, -1.0], size, p=[0.15, 0.75, 0.10]), 0.05),
    "pass rates of 8": (lambda rng, size: rng.binomial(8, rng.beta(0.5, 1.5, size)) / 8, 0.25),
    "a gap that all problems have": (lambda rng, size: rng.normal(0.02, 0.01, size), 0.02),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_intervals_hold_what_they_should_as_often_as_they_say(monkeypatch, draw):
    """500 studies of 60 problems: 5 % of the intervals may miss, and half of these on each side."""
    monkeypatch.setattr(intervals, "BOOTSTRAPS", 800)
    made, true = DRAWS[draw]
    studies = made(np.random.default_rng(3), (60, 500))
    figures = [lambda means, place=place: means[..., place] for place in range(500)]
    bounds = np.array([found.interval() for found in intervals.bootstraps(studies, figures, seed=5)])
    above, below = np.mean(bounds[:, 0] > true), np.mean(bounds[:, 1] < true)
    assert 0.025 <= above + below <= 0.085 and 0.01 <= above <= 0.05 and 0.01 <= below <= 0.05


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01, then 2 x 0.03, and 1 x 0.04 may not undercut it
        ([0.5, 0.5], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
        ([0.001, 0.02, 0.02, 0.9], [0.004, 0.06, 0.06, 0.9]),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


def test_a_claim_alone_is_told_as_its_interval_lies():
    rng = np.random.default_rng(0)
    for mean in (-0.3, -0.15, -0.05, 0.05, 0.1, 0.15, 0.3):
        [verdict] = verdicts({"claim": rng.normal(mean, 0.7, 80)}).values()
        low, high = verdict.interval
        assert verdict.outcome == ("holds" if low > 0 else "does not hold" if high < 0 else "cannot tell")
        assert verdict.p_value == verdict.p_holm and (verdict.p_value < 0.05) == (not low <= 0 <= high)


def test_a_claim_among_many_needs_more():
    wins = [1.0] * 12 + [-1.0] * 4 + [0.0] * 84  # alone its interval lies above 0
    assert verdicts({"claim": wins})["claim"].outcome == "holds"
    many = verdicts({"claim": wins} | {f"other {i}": [1.0, -1.0] * 50 for i in range(4)})
    assert many["claim"].outcome == "cannot tell" and many["claim"].interval[0] > 0
    assert many["claim"].p_holm == pytest.approx(5 * many["claim"].p_value)
    assert verdicts({"claim": [-1.0] * 60 + [0.0] * 40} | {"other": [1.0, -1.0] * 50})["claim"].outcome == "does not hold"


@pytest.mark.parametrize(("wins", "outcome"), [(1, "cannot tell"), (5, "cannot tell"), (6, "holds"), (0, "cannot tell")])
def test_a_handful_of_problems_that_differ_decides_nothing(wins, outcome):
    """Five heads in a row, or five tails, are no rarer than 2^-4."""
    [verdict] = verdicts({"claim": [1.0] * wins + [0.0] * (10 if wins == 0 else 0)}).values()
    assert verdict.outcome == outcome and verdict.p_value == (max(2.0 ** (1 - wins), 1e-4) if wins else 1.0)


def test_a_study_that_finds_something_where_nothing_is_is_rare(monkeypatch):
    """120 studies of five claims that are all level: one in twenty may find one of them true or false."""
    monkeypatch.setattr(intervals, "BOOTSTRAPS", 800)
    rng = np.random.default_rng(8)
    wrong = sum(
        any(verdict.outcome != "cannot tell" for verdict in verdicts({str(i): rng.normal(0, 1, 40) for i in range(5)}).values())
        for _ in range(120)
    )
    assert wrong <= 14
