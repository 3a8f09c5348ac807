import math

import pytest

from tts_engine.search import MethodError, Rebase
from tts_engine.testing import play_method, scripted_policy, scripted_prm, solutions


def test_budget_follows_the_softmax_of_scores_and_shrinks_with_each_finished_branch():
    # balance .1, n = 6
    # round 1: a .5  b .4  c. .9  d .1  e. .2  f .3 -> c. and e. finish, 4 draws are left for a b d f
    #          e^5 148.41, e^4 54.60, e^1 2.72, e^3 20.09, sum 225.82 -> 2.63, .97, .05, .36
    #          floors 2 0 0 0, remainders .63 .97 .05 .36: b and a get one more -> a 3, b 1, d 0, f 0
    # round 2: ag. .6  ah .6  ai .5  bj. .1 -> two more finish, 2 draws left for ah .6, ai .5: 1.46, .54 -> floors 1 0,
    #          remainders .46 .54 -> 1 and 1
    # round 3: both finish
    steps = {"": "a b c. d e. f", "a": "g. h i", "b": "j.", "ah": "k.", "ai": "l~"}
    scores = {"a": 0.5, "b": 0.4, "c.": 0.9, "d": 0.1, "e.": 0.2, "f": 0.3, "ag.": 0.6, "ah": 0.6, "ai": 0.5, "bj.": 0.1}
    result, rounds = play_method(Rebase(n=6), scripted_policy(steps), scripted_prm(scores | {"ahk.": 0.5, "ail~": 0.5}))
    assert [expanded.parents for (expanded,) in rounds] == [[""] * 6, ["a", "a", "a", "b"], ["ah", "ai"]]
    assert solutions(result) == ["c.", "e.", "ag.", "bj.", "ahk.", "ail~"]


def test_a_large_balance_spreads_evenly_and_a_small_one_is_greedy():
    steps = {"": "a b", "a": "x. x.", "b": "x."}
    scores = {"a": 0.6, "b": 0.1, "ax.": 0.5, "bx.": 0.5}
    for balance, ref in [(100.0, ["a", "b"]), (0.01, ["a", "a"])]:
        _, rounds = play_method(Rebase(n=2, balance=balance), scripted_policy(steps), scripted_prm(scores))
        assert rounds[1][0].parents == ref


@pytest.mark.parametrize("balance", [0, -1, math.inf, math.nan])
def test_balance_must_be_above_zero(balance):
    with pytest.raises(MethodError, match="balance must be a number above 0"):
        Rebase(n=4, balance=balance)
