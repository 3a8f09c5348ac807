"""Figures of a PRM: each worked out by hand on a few steps, and on made-up PRMs whose worth is known."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from tts_engine.errors import EngineError
from tts_engine.report import intervals, prm_quality
from tts_engine.report.diagnostics import FEWEST, Diagnostics, Subject
from tts_engine.report.prm_quality import (
    Judged,
    Solution,
    Step,
    calibration,
    choosing,
    diagnose,
    first_errors,
    score_by_length,
    step_agreement,
)
from tts_engine.search.voting import all_aggregates
from tts_engine.strategy.typed import parse

SUBJECT = Subject(source="run", form="run", policy="p", prm="q", task="t", method="best_of_n n=4", length_unit="policy tokens",
                  labels="the file", failed=0)  # fmt: skip


def made_up(score, problems=150, draws=4, seed=0, error_rate=0.3):
    """Judged problems of made-up solutions of up to 4 steps; score(good, rng) is what the PRM says of a step. A share of steps is
    wrong, another in every problem; what follows a first error is scored as wrong, and a solution with one has a wrong answer."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(problems):
        steps, solutions, wrong = [], [], rng.beta(2, 2 / error_rate - 2)
        for _ in range(draws):
            flaws = rng.random(rng.integers(2, 5)) < wrong
            first = int(flaws.argmax()) if flaws.any() else -1
            scores = tuple(float(score(first < 0 or i < first, rng)) for i in range(len(flaws)))
            for i, one in enumerate(scores):
                behind = 0 <= first < i
                steps.append(Step(one, int(rng.integers(3, 30)), None if behind else i != first, behind))
            solutions.append(Solution(scores, first, "1" if first < 0 else f"{rng.integers(2, 4)}", first < 0))
        made.append(Judged(tuple(steps), tuple(solutions)))
    return made


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "BOOTSTRAPS", 2000)


def holds(estimate, value):
    return estimate.low <= value <= estimate.high


# --- by hand --------------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    out = calibration([[(0.2, False), (0.8, True)], [(0.8, False), (0.9, True)], []], "step")
    assert (out.count, out.true) == (4, 2)
    assert out.ece == pytest.approx((1 * 0.2 + 2 * 0.3 + 1 * 0.1) / 4)
    assert out.bias.value == pytest.approx((2.7 - 2) / 4) and out.bias.problems == 2
    assert out.auc.value == pytest.approx((1 + 0.5 + 1 + 1) / 4)  # .8 ties with .8
    assert out.auc_within.value == 1.0 and out.auc_within.problems == 2
    assert [one.count for one in out.bins] == [0, 0, 1, 0, 0, 0, 0, 0, 2, 1]
    assert (out.bins[8].mean_score, out.bins[8].true.value, out.bins[8].true.problems) == (pytest.approx(0.8), 0.5, 2)
    assert out.bins[0].mean_score is None and out.bins[0].true.value is None and out.bins[0].true.why == "no score falls here"
    assert out.auc.low is None and out.auc.why == "too few problems for an interval: 2"


@pytest.mark.parametrize("edge", range(11))
def test_a_score_on_an_edge_is_in_the_bin_above_it(edge):
    out = calibration([[(edge / 10, True)]], "step")
    assert [place for place, one in enumerate(out.bins) if one.count] == [min(edge, 9)]


def test_within_a_problem_by_hand():
    """Who only knows which problems are hard is no better than chance within one."""
    hard, easy = [(0.3, False), (0.3, False), (0.3, True)], [(0.9, True), (0.9, False), (0.9, True)]
    out = calibration([hard, easy, [(0.1, True)]], "step")
    assert out.auc_within.value == 0.5 and out.auc_within.problems == 2
    assert calibration([[(0.3, True), (0.5, False), (0.6, True), (0.5, True)]], "step").auc_within.value == (0 + 1 + 0.5) / 3
    assert calibration([hard, easy], "step").auc.value == (2 * (2 + 0.5) + (2 * 0.5 + 0)) / 9


@pytest.mark.parametrize(("truth", "why"), [(True, "no solution is wrong"), (False, "no solution is right")])
def test_of_one_kind_alone_there_is_no_auc(truth, why):
    out = calibration([[(0.3, truth), (0.4, truth)]] * 9, "solution")
    assert out.auc.value is out.auc.low is out.auc.high is None and out.auc.why == why
    assert out.auc_within.value is None and out.auc_within.why == "no problem has both kinds of solutions"
    assert out.bias.value == pytest.approx(0.35 - truth)


def test_agreement_by_hand():
    problems = [
        Judged((Step(0.9, 5, True), Step(0.4, 5, True), Step(0.6, 5, False), Step(0.5, 5, None, True)), ()),
        Judged((Step(0.5, 5, True), Step(0.1, 5, False), Step(0.2, 5, None, True), Step(0.3, 5, None)), ()),
    ]
    out = step_agreement(problems, 0.5)
    assert (out.accuracy.value, out.over_criticism.value, out.error_neglect.value) == pytest.approx((3 / 5, 1 / 3, 1 / 2))
    assert out.forgiven.value == 0.5  # 0.5 is called good, 0.2 is not, and the last step is nobody's
    assert out.always == 3 / 5
    assert (out.best_threshold, out.best_accuracy) == (0.4, 4 / 5)  # three good ones against 0.6


@pytest.mark.parametrize(
    ("scores", "first", "kind"),
    [
        ((0.9, 0.4, 0.1), 1, "found"),
        ((0.5, 0.49), 1, "found"),
        ((0.4, 0.4, 0.9), 1, "early"),
        ((0.2, 0.9), 1, "early"),
        ((0.9, 0.5, 0.3), 1, "late"),
        ((0.9, 0.3), 0, "late"),
        ((0.9, 0.8), 0, "never"),
        ((0.4, 0.9), 0, "found"),
        ((0.5, 0.9), -1, "passed"),
        ((0.9, 0.49), -1, "refused"),
    ],
)
def test_where_an_error_is_seen(scores, first, kind):
    out = first_errors([[Solution(scores, first, None, None)]], 0.5)
    if first < 0:
        assert (out.erroneous, out.correct, out.accuracy_correct.value) == (0, 1, float(kind == "passed"))
        assert out.f1.value is None and out.f1.why == out.early.why == "no solution has an error"
    else:
        found = {"found": out.accuracy_erroneous, "early": out.early, "late": out.late, "never": out.never}
        assert {name: one.value for name, one in found.items()} == {name: float(name == kind) for name in found}
        assert out.f1.value is None and out.f1.why == "no solution is without error"
    assert out.best_f1 is out.best_threshold is None


def test_f1_by_hand():
    solutions = [((0.9, 0.2), 1), ((0.9, 0.6), 1), ((0.3, 0.2), 1), ((0.7, 0.8), -1), ((0.4, 0.8), -1)]
    out = first_errors([[Solution(scores, first, None, None)] for scores, first in solutions], 0.5)
    assert (out.accuracy_erroneous.value, out.accuracy_correct.value) == pytest.approx((1 / 3, 1 / 2))
    assert out.f1.value == pytest.approx(2 / (3 + 2))
    # up to 0.3 two errors are found and both correct ones pass
    assert (out.best_threshold, out.best_f1) == (0.3, pytest.approx(2 / (3 / 2 + 1)))


def test_the_best_threshold_is_that_of_trying_all():
    solutions = [s for one in made_up(lambda good, rng: rng.random() ** (0.5 if good else 1.5), 40) for s in one.solutions]
    tried = {t: first_errors([solutions], t).f1.value for t in sorted({score for s in solutions for score in s.scores})[::7]}
    out = first_errors([solutions], 0.5)
    assert out.best_f1 >= max(tried.values()) - 1e-12
    assert first_errors([solutions], out.best_threshold).f1.value == pytest.approx(out.best_f1)


@pytest.mark.parametrize(
    ("lengths", "scores", "rho"),
    [
        ([1, 2, 3, 4], [0.1, 0.3, 0.2, 0.4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 9], [0.1, 0.2, 0.9], 1.0),
        ([1, 2, 9], [0.9, 0.2, 0.1], -1.0),
        ([1, 1, 2], [0.1, 0.1, 0.9], 1.0),
        ([1, 1, 2, 2], [0.1, 0.2, 0.1, 0.2], 0.0),
        ([5, 5, 5], [0.1, 0.2, 0.3], None),
        ([5, 6, 7], [0.5, 0.5, 0.5], None),
    ],
)
def test_rank_correlation_by_hand(lengths, scores, rho):
    steps = tuple(Step(score, length, None) for length, score in zip(lengths, scores, strict=True))
    out = score_by_length([Judged(steps, ())])
    if rho is None:
        assert out.correlation.value is None and out.correlation.why == "lengths or scores do not vary"
    else:
        assert out.correlation.value == pytest.approx(rho, abs=1e-9)
    assert out.among_good.value is None and out.among_good.why == "no step is known to be good"
    assert sum(one.steps for one in out.bins) == len(steps) and out.bins[0].low == min(lengths)


def test_length_bins_by_hand():
    steps = tuple(Step(length / 10, length, good) for length, good in zip(range(1, 11), [True, False] * 5, strict=True))
    out = score_by_length([Judged(steps, ())])
    assert [(one.low, one.high, one.steps) for one in out.bins] == [(1, 2, 2), (3, 4, 2), (5, 6, 2), (7, 8, 2), (9, 10, 2)]
    assert [one.mean_score.value for one in out.bins] == pytest.approx([0.15, 0.35, 0.55, 0.75, 0.95])
    assert {one.good.value for one in out.bins} == {0.5}


# --- choosing -------------------------------------------------------------------------------------------------------------


def random_draws(rng, count):
    groups = [None, "", "1", "2", "3"]
    draws = []
    for _ in range(count):
        group = groups[rng.integers(5)]
        draws.append(Solution(tuple(map(float, rng.random(rng.integers(1, 4)))), None, group, group == "1"))
    return draws


def chosen(draws, rule):
    """Whether the engine's own voting gives the right answer."""
    return all_aggregates([draw.group for draw in draws], [draw.scores for draw in draws])[rule] == "1"


def test_rules_choose_as_a_search_does_among_all_draws_and_one():
    rng = np.random.default_rng(3)
    problems = [random_draws(rng, 6) for _ in range(60)]
    out = choosing(problems)
    for point in out.curve:
        if point.n == 6:
            assert point.accuracy.value == pytest.approx(np.mean([chosen(draws, point.rule) for draws in problems]))
        if point.n == 1:
            assert point.accuracy.value == pytest.approx(out.pass_at_1.value)
    assert out.pass_at_1.value == pytest.approx(np.mean([draw.correct for draws in problems for draw in draws]))
    assert out.any_right.value == np.mean([any(draw.correct for draw in draws) for draws in problems])
    assert [point.n for point in out.curve if point.rule == "majority"] == [1, 2, 4, 6]
    assert {(point.promised is None) for point in out.curve if point.rule.endswith("_max")} == {False}


def test_fewer_draws_stand_for_all_subsets_of_that_size():
    rng = np.random.default_rng(4)
    problems = [random_draws(rng, 5) for _ in range(40)]
    out = {(point.rule, point.n): point.accuracy.value for point in choosing(problems).curve}
    for rule in ("majority", "last_max", "min_vote"):
        for n in (2, 4):
            subsets = [[chosen(part, rule) for part in combinations(draws, n)] for draws in problems]
            assert out[rule, n] == pytest.approx(np.mean(subsets), abs=4 * 0.5 / (prm_quality.SUBSETS * len(problems)) ** 0.5)


def test_what_is_promised_and_what_a_doubling_brings_by_hand():
    draws = [Solution((0.2,), None, "1", True), Solution((0.9,), None, "2", False)]
    out = choosing([draws] * 6)
    rules = {gain.rule: gain for gain in out.gains}
    assert (rules["last_max"].gain.value, rules["last_max"].last_doubling.value) == (-0.5, -0.5)
    assert (rules["majority"].gain.value, rules["majority"].gain.low) == (0.5, 0.5)  # the earlier draw wins a tie
    promised = {point.n: point.promised.value for point in out.curve if point.rule == "last_max"}
    assert promised == pytest.approx({1: 0.55, 2: 0.9})
    problems = [Judged((Step(0.2, 3, None),), tuple(draws))] * 6
    assert "last_max" in diagnose(problems, SUBJECT).signs["over-optimisation"]


# --- PRMs whose worth is known --------------------------------------------------------------------------------------------


def test_a_perfect_prm():
    out = diagnose(made_up(lambda good, rng: float(good)), SUBJECT)
    assert out.step_scores.auc.value == 1 and (out.step_scores.auc.low, out.step_scores.auc.high) == (1, 1)
    assert out.step_scores.ece == out.step_scores.bias.value == 0
    assert out.agreement.accuracy.value == out.first_error.f1.value == out.first_error.best_f1 == 1
    assert out.answers["min"].auc.value == 1 and out.signs["confidence"] == "cannot tell"
    best = {gain.rule: gain.gain.value for gain in out.choice.gains}
    assert best["min_max"] == pytest.approx(out.choice.any_right.value - out.choice.pass_at_1.value)


def test_a_random_prm():
    out = diagnose(made_up(lambda good, rng: rng.random()), SUBJECT)
    assert holds(out.step_scores.auc, 0.5) and abs(out.step_scores.auc.value - 0.5) < 0.05
    assert out.first_error.f1.high < 0.4 and out.agreement.accuracy.high < 0.6
    assert holds(out.length.correlation, 0) and out.signs["length"] == "cannot tell"
    assert holds({gain.rule: gain for gain in out.choice.gains}["last_max"].gain, 0)


@pytest.mark.parametrize(
    ("power", "sign"),
    [(1.0, "cannot tell"), (0.3, "scores too high: error neglect"), (3.0, "scores too low: over-criticism")],
)
def test_a_calibrated_prm_and_two_that_are_not(power, sign):
    rng, problems = np.random.default_rng(5), []
    for _ in range(300):
        chances = rng.random(8)
        problems.append(Judged(tuple(Step(float(chance**power), 5, bool(rng.random() < chance)) for chance in chances), ()))
    out = diagnose(problems, SUBJECT)
    steps = out.step_scores
    assert (steps.ece < steps.ece_by_luck) == (power == 1.0) and steps.ece_by_luck < 0.05
    assert out.signs["confidence"] == sign
    if power == 1.0:
        assert all(abs(one.true.value - one.mean_score) < 0.12 for one in steps.bins)


@pytest.mark.parametrize(
    ("slope", "sign"), [(0.02, "long steps score higher"), (-0.02, "long steps score lower"), (0, "cannot tell")]
)
def test_a_prm_that_goes_by_length(slope, sign):
    rng, problems = np.random.default_rng(6), []
    for _ in range(60):
        lengths = rng.integers(3, 20, size=6)
        steps = [Step(float(0.5 + slope * (length - 10) + 0.2 * (rng.random() - 0.5)), int(length), True) for length in lengths]
        problems.append(Judged(tuple(steps), ()))
    assert diagnose(problems, SUBJECT).signs["length"] == sign


def test_the_interval_of_auc_is_that_of_resampled_problems():
    problems = made_up(lambda good, rng: rng.random() ** (0.6 if good else 1.4), 60)
    pairs = [[(step.score, step.good) for step in one.steps if step.good is not None] for one in problems]
    out, rng, areas = calibration(pairs, "step").auc, np.random.default_rng(1), []
    for _ in range(400):
        scores, truths = zip(*(pair for i in rng.integers(len(pairs), size=len(pairs)) for pair in pairs[i]), strict=True)
        good, bad = (np.array(scores)[np.array(truths) == kind] for kind in (True, False))
        areas.append((good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2)
    assert (out.low, out.high) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.012)


# --- what is missing ------------------------------------------------------------------------------------------------------


def test_what_nobody_knows_is_said_and_is_no_number():
    steps = (Step(0.4, 3, None), Step(0.6, 4, None))
    out = diagnose([Judged(steps, (Solution((0.4, 0.6), None, "1", None),))] * 9, SUBJECT)
    assert out.step_scores is out.agreement is out.first_error is out.choice is None and not out.answers
    assert set(out.missing) == {"step_scores", "agreement", "first_error", "answers", "choice"}
    assert out.missing["choice"] == "nobody says which answers are right" and out.good_steps is None
    assert "confidence" not in out.signs


@pytest.mark.parametrize(("count", "wide"), [(FEWEST - 1, False), (FEWEST, True)])
def test_few_problems_have_no_interval(count, wide):
    out = diagnose(made_up(lambda good, rng: rng.random(), count), SUBJECT).length.correlation
    assert (out.low is not None) == (out.why is None) == wide and out.value is not None


def test_unequal_numbers_of_draws_are_no_choice():
    first, *others = made_up(lambda good, rng: rng.random(), 9)
    out = diagnose([replace(first, solutions=first.solutions[:2]), *others], SUBJECT)
    assert out.choice is None and out.missing["choice"] == "problems differ in how many draws they have"
    assert diagnose(others, SUBJECT, no_choice="beam").missing == {"choice": "beam"}


def test_the_record_is_json_and_comes_back():
    out = diagnose(made_up(lambda good, rng: rng.random(), 12), SUBJECT)
    assert parse(json.dumps(asdict(out), allow_nan=False), Diagnostics, "diagnostics.json") == out


@pytest.mark.parametrize(
    ("problems", "threshold", "words"),
    [
        ([], 0.5, "no scored step"),
        ([Judged((), ())], 0.5, "no scored step"),
        ([Judged((Step(float("nan"), 3, True),), ())], 0.5, "the score nan, which is no probability"),
        ([Judged((Step(1.5, 3, True),), ())], 0.5, "the score 1.5"),
        ([Judged((Step(0.5, 3, True),), (Solution((-0.1,), -1, None, None),))], 0.5, "the score -0.1"),
        ([Judged((Step(0.5, 3, True),), ())], float("nan"), "the threshold is a score from 0 to 1, not nan"),
    ],
)
def test_what_is_no_score_is_refused(problems, threshold, words):
    with pytest.raises(EngineError, match=words):
        diagnose(problems, SUBJECT, threshold=threshold)
