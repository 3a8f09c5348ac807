"""How the embedded models are measured."""

import numpy as np
import pytest

from tts_engine.embedded.check import Figure, _wins, mean


def test_a_pair_is_won_by_the_good_step_and_a_tie_counts_half():
    assert _wins([(0.9, True), (0.5, True), (0.5, False), (0.1, False)]) == (3.5, 4)
    assert _wins([(0.2, True), (0.9, False)]) == (0.0, 1)
    assert _wins([(0.2, True)]) == (0.0, 0)


def test_a_mean_keeps_some_error_where_all_problems_agree():
    assert mean([1.0] * 20).value == 1.0 and mean([1.0] * 20).error > 0.02
    rng = np.random.default_rng(0)
    values = rng.random(2000).tolist()
    assert mean(values).error == pytest.approx(np.std(values) / np.sqrt(2000), rel=0.01)


def test_an_interval_is_that_of_the_normal_distribution_inside_0_and_1():
    low, high = Figure(0.5, 0.1).interval(0.95)
    assert (low, high) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert Figure(0.99, 0.1).interval()[1] == 1.0
    assert str(Figure(0.317, 0.02)) == "31.7 (28-36)"
