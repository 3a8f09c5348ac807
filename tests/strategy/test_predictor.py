"""The predictor against worlds whose chances are known."""

from dataclasses import replace

import numpy as np
import pytest

from tts_engine.strategy import StrategyError
from tts_engine.strategy.difficulty import Draws
from tts_engine.strategy.predictor import Predictor, cross_predict, features, fit_predictor

NAMES = ("easy", "medium", "hard")


def world(count, seed=0):
    """Problems whose features tell their bin by a proportional-odds model; their bins, and each bin's true chances."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, 3))
    lean = z @ np.array([1.5, 1.0, -0.5])
    easier = 1 / (1 + np.exp(-(lean[:, None] + np.array([-1.0, 1.0]))))
    chances = np.diff(np.concatenate([np.zeros((count, 1)), easier, np.ones((count, 1))], axis=1), axis=1)
    places = [rng.choice(3, p=row) for row in chances]
    columns = zip(*(0.5 + 0.1 * z.T), strict=True)  # any centre and scale
    found = [dict(zip(("agreement", "prm_mean", "prm_spread"), row, strict=True)) for row in columns]
    return found, [NAMES[place] for place in places], chances


def test_features_by_hand():
    draws = Draws((True, False, False, False), ("7", "7", "8", None), ((0.1, 0.9), (0.5,), (0.3, 0.1), (0.5,)))
    out = features(draws)
    assert out["agreement"] == 0.5 and out["prm_mean"] == pytest.approx((0.1 + 0.5 + 0.1 + 0.5) / 4)
    assert out["prm_spread"] == pytest.approx(0.2)
    assert features(Draws((), (None, None), None)) == {"agreement": 0.0}


def test_chances_are_those_of_the_world_and_hold_on_new_problems():
    found, known, _ = world(2_000)
    predictor = fit_predictor(found, known, NAMES, draws=4)
    new, _, true = world(500, seed=1)
    out = np.array([predictor.chances(one) for one in new])
    assert np.allclose(out.sum(1), 1) and out.min() >= 0
    assert np.abs(out - true).mean() < 0.03  # calibrated problem by problem, not only on average
    assert predictor.weights[0] > predictor.weights[1] > 0 > predictor.weights[2]


def test_the_confusion_table_counts_problems_predicted_by_the_others():
    found, known, true = world(600)
    predictor = fit_predictor(found, known, NAMES, draws=4)
    table = predictor.confusion
    assert {name: sum(table[name].values()) for name in NAMES} == {name: known.count(name) for name in NAMES}
    predicted = cross_predict(found, known, NAMES, draws=4)
    assert table["hard"]["easy"] == sum(ours == "hard" and theirs == "easy" for ours, theirs in zip(known, predicted, strict=True))
    best = sum(NAMES[place] == name for place, name in zip(true.argmax(1), known, strict=True))  # what nobody can outdo
    right = sum(table[name][name] for name in NAMES)
    assert 0.93 * best <= right <= best + 12 and right > max(known.count(name) for name in NAMES)


def test_what_tells_nothing_predicts_the_shares():
    known = ["easy"] * 60 + ["medium"] * 30 + ["hard"] * 10
    predictor = fit_predictor([{"agreement": 0.5}] * 100, known, NAMES, draws=4)
    assert predictor.chances({"agreement": 0.5}) == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert predictor.weights == (0.0,) and not predictor.uses_prm


def test_bins_told_apart_and_bins_without_a_problem_stay_finite():
    found = [{"agreement": 1.0}] * 20 + [{"agreement": 0.25}] * 20
    predictor = fit_predictor(found, ["easy"] * 20 + ["hard"] * 20, NAMES, draws=4)
    easy, medium, hard = predictor.chances({"agreement": 1.0})
    assert easy > 0.85 and medium < 0.05 and np.isfinite([*predictor.weights, *predictor.thresholds]).all()
    assert predictor.chances({"agreement": 0.25})[2] > 0.85


def test_too_few_problems_are_refused():
    with pytest.raises(StrategyError, match="4 problems are too few"):
        fit_predictor([{"agreement": 1.0}] * 4, ["easy"] * 4, NAMES, draws=4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weights": (1.0, 2.0)}, "a weight for each"),
        ({"features": ("mood",)}, "some of agreement"),
        ({"draws": 0}, "at least one draw"),
        ({"scales": (0.0,)}, "scales are above 0"),
        ({"thresholds": (1.0, 0.0)}, "thresholds rise"),
    ],
)
def test_a_predictor_that_is_none_is_refused(changed, words):
    sound = Predictor(features=("agreement",), draws=4, centres=(0.5,), scales=(0.1,), weights=(1.0,), thresholds=(0.0, 1.0))
    with pytest.raises(StrategyError, match=words):
        replace(sound, **changed)
