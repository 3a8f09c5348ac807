"""Hand-worked traces of two subtrees per preset, and what lanes promise about the subtrees' draws."""

from dataclasses import replace

import pytest

from tts_engine.search import PAPER, REFERENCE, SAL, Dvts
from tts_engine.testing import play_method, random_policy, random_prm, scripted_policy, scripted_prm, solutions

# n = 4, width = 2: two subtrees. Draws and scores in subtree 0, then in subtree 1:
#   (prompt)  a .5   b .6          (prompt)  y. .9   z .2
#   b         c. .4  d .7
#   bd        e. .3  f. .35
SUBTREES = {(0,): {"": "a b", "b": "c. d", "bd": "e. f."}, (1,): {"": "y. z"}}
SCORES = {"a": 0.5, "b": 0.6, "bc.": 0.4, "bd": 0.7, "bde.": 0.3, "bdf.": 0.35, "y.": 0.9, "z": 0.2}


def two_subtrees(draw):
    return scripted_policy(SUBTREES[draw.lane])(draw)


@pytest.mark.parametrize(
    ("rules", "ref"),
    [
        # subtree 0: b; then bd, which outdoes bc.; then of bc. .4, bde. .3, bdf. .35 the old bc. is best: the end. 1: y. at once.
        (PAPER, ["bc.", "bde.", "bdf.", "y."]),
        # subtree 0: b; bd (bc. is lost); bdf. holds the one place. 1: y.
        (REFERENCE, ["bdf.", "y."]),
        # subtree 0: b; bd; bdf. is best and finished: both siblings. 1: y. is best and finished: with its sibling z, unfinished
        (SAL, ["bde.", "bdf.", "y.", "z"]),
    ],
    ids=["paper", "reference", "sal"],
)
def test_what_is_voted(rules, ref):
    result, rounds = play_method(Dvts(n=4, width=2, rules=rules), two_subtrees, scripted_prm(SCORES))
    assert [[expanded.parents for expanded in r] for r in rounds] == [[["", ""], ["", ""]], [["b", "b"]], [["bd", "bd"]]]
    assert solutions(result) == ref


def test_a_sal_subtree_whose_children_are_all_dropped_ends_with_their_parent():
    rules = replace(SAL, drop_truncated=True)
    method = Dvts(n=2, width=2, rules=rules)
    result, _ = play_method(method, scripted_policy({"": "a b", "b": "c~ d~"}), scripted_prm({"a": 0.1, "b": 0.2}))
    assert solutions(result) == ["b"]


def draws_by_lane(n, **how):
    """lane -> (parent, number, identity, text) of all its draws, under a uniform policy that sees nothing but the draw."""
    _, rounds = play_method(Dvts(n=n, width=4), random_policy(seed=3), random_prm(seed=3), **how)
    found = {}
    for r in rounds:
        for expanded in r:
            for draw, text in zip(expanded.draws, expanded.steps, strict=True):
                found.setdefault(draw.lane, []).append((draw.branch.solution, draw.draw, draw.identity, text))
    return found


def test_subtrees_of_a_uniform_policy_differ():
    lanes = draws_by_lane(64)
    assert sorted(lanes) == [(j,) for j in range(16)]
    first_steps = {tuple(text for _, _, _, text in draws[:4]) for draws in lanes.values()}
    assert len(first_steps) > 12  # six letters and two endings: 16 equal subtrees would give 1
    identities = [identity for draws in lanes.values() for _, _, identity, _ in draws]
    assert len(set(identities)) == len(identities)


def test_subtree_j_is_the_same_for_every_n():
    small, large = draws_by_lane(8), draws_by_lane(16)
    assert len(small) == 2 and len(large) == 4
    assert small == {lane: large[lane] for lane in small}


def test_the_order_in_which_asks_are_answered_changes_no_draw():
    assert draws_by_lane(16) == draws_by_lane(16, newest_first=True)
