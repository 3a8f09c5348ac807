"""Bins of difficulty, and which draws may tell it."""

import numpy as np
import pytest

from tts_engine.strategy import StrategyError
from tts_engine.strategy.difficulty import Bins, absolute_bins, quantile_bins, read_draws, refuse_as_pilot, refuse_shared_draws
from tts_engine.tasks.grader import Grader


@pytest.mark.parametrize(
    ("rate", "bin"), [(1.0, "easy"), (0.5, "easy"), (0.49, "medium"), (0.1, "medium"), (0.0999, "hard"), (0.0, "hard")]
)
def test_the_papers_bins_hold_their_lower_ends(rate, bin):
    assert absolute_bins().of(rate) == bin


def test_other_edges_name_their_ranges():
    bins = absolute_bins([0.75])
    assert bins.names == ("75-100 %", "0-75 %") and bins.of(0.8) == "75-100 %" and bins.of(0.2) == "0-75 %"


def test_quantile_bins_hold_equally_many():
    rates = np.random.default_rng(0).permutation(np.arange(1, 101) / 101)
    bins = quantile_bins(list(rates))
    counts = [sum(bins.of(rate) == name for rate in rates) for name in bins.names]
    assert bins.names == ("q1", "q2", "q3", "q4", "q5") and all(19 <= count <= 21 for count in counts)
    assert bins.of(max(rates)) == "q1" and bins.of(min(rates)) == "q5"


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        ([0.0] * 6 + [0.25, 0.5, 0.75, 1.0], [2, 2, 6]),  # six at 0 stay together
        ([0.5] * 10, [10]),
        ([0.0] * 5 + [1.0] * 5, [5, 5]),
    ],
)
def test_problems_of_one_rate_stay_in_one_quantile_bin(rates, sizes):
    bins = quantile_bins(rates)
    assert [sum(bins.of(rate) == name for rate in rates) for name in bins.names] == sizes


@pytest.mark.parametrize(
    ("names", "edges", "words"),
    [
        (("a", "b"), (0.5, 0.1), "2 edges make 3 bins"),
        (("a", "a"), (0.5,), "own names"),
        (("a", "b", "c"), (0.1, 0.5), "falling"),
        (("a", "b"), (1.5,), "above 0 and up to 1"),
    ],
)
def test_bins_that_are_none_are_refused(names, edges, words):
    with pytest.raises(StrategyError, match=words):
        Bins(kind="absolute", names=names, edges=edges)


RECORD = {
    "id": "p", "gold": "7", "error": None,
    "nodes": [{"parent": -1, "score": 0.9}, {"parent": -1, "score": 0.2}, {"parent": 0, "score": 0.8}],
    "branches": [{"node": 2, "answer": "7", "group": "7"}, {"node": 1, "answer": "8", "group": "8"},
                 {"node": 0, "answer": None, "group": None}],
}  # fmt: skip


def test_draws_are_judged_one_by_one_in_their_order():
    with Grader() as grader:
        draws = read_draws(RECORD, grader)
        assert draws.correct == (True, False, False) and draws.groups == ("7", "8", None)
        assert draws.scores == ((0.9, 0.8), (0.2,), (0.9,)) and draws.pass_rate == pytest.approx(1 / 3)
        assert draws.only(1).correct == (False, False) and draws.only(0, 1).scores == ((0.9, 0.8),)
        unread = RECORD | {"nodes": [node | {"score": None} for node in RECORD["nodes"]]}
        assert read_draws(unread, grader).scores is None
        assert read_draws(RECORD | {"error": "too long"}, grader) is None
        with pytest.raises(StrategyError, match="no known answer"):
            read_draws(RECORD | {"gold": None}, grader)


def test_draws_are_shared_by_one_policy_with_one_seed_only():
    pilot = {"policy": {"sha256": {"w": "1"}}, "seed": 0}
    refuse_shared_draws(pilot, "a", pilot | {"seed": 1}, "b")
    refuse_shared_draws(pilot, "a", pilot | {"policy": {"sha256": {"w": "2"}}}, "b")
    with pytest.raises(StrategyError, match="a and b share their draws, both of seed 0: .* another --seed"):
        refuse_shared_draws(pilot, "a", pilot, "b")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "beam", "rules": {"temperature": 0.7}}, "a is a run of beam: only independent draws tell"),
        ({"name": "cot"}, "run of cot"),
        ({"name": "majority", "rules": {"temperature": 0.0}}, "all draws alike"),
    ],
)
def test_only_independent_draws_are_a_pilot(method, words):
    with pytest.raises(StrategyError, match=words):
        refuse_as_pilot({"method": method}, "a")
