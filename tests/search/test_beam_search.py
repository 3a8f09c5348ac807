"""Hand-worked traces, one per preset. A step is a letter; "." ends the text, "~" is cut; a branch is named by its solution."""

from dataclasses import replace

import pytest

from tts_engine.branch import Finish
from tts_engine.search import PAPER, REFERENCE, SAL, BeamSearch, MethodError
from tts_engine.testing import play_method, scripted_policy, scripted_prm, solutions

# Shared by the three presets, n = 4, width = 2, so two survivors. Draws after a branch, in order, with their scores:
#   (prompt)  a .5   b .4   c. .7  d .2
#   a         e .6   f .8
#   b         k .1   l. .2
#   ae        m~ .05 n. .3
#   af        g. .65 h .75
#   afh       i. .3  j~ .1  p. .9  q. .35
STEPS = {"": "a b c. d", "a": "e f", "b": "k l.", "ae": "m~ n.", "af": "g. h", "afh": "i. j~ p. q."}
SCORES = {"a": 0.5, "b": 0.4, "c.": 0.7, "d": 0.2, "ae": 0.6, "af": 0.8, "bk": 0.1, "bl.": 0.2, "aem~": 0.05, "aen.": 0.3}
SCORES |= {"afg.": 0.65, "afh": 0.75, "afhi.": 0.3, "afhj~": 0.1, "afhp.": 0.9, "afhq.": 0.35}


def run(method, steps=STEPS, scores=SCORES):
    """The solutions voted, and for each round the parents of its draws."""
    result, rounds = play_method(method, scripted_policy(steps), scripted_prm(scores))
    return solutions(result), [expanded.parents for (expanded,) in rounds]


def test_paper_finished_branches_compete_and_all_of_them_are_voted():
    # round  draws after  new candidates      pool (finished first)           two best     live
    # 1      4 x prompt   a b c. d            a .5  b .4  c. .7  d .2         c. a         a
    # 2      a a          ae af               c. .7  ae .6  af .8             af c.        af
    # 3      af af        afg. afh            c. .7  afg. .65  afh .75        afh c.       afh
    # 4      afh afh      afhi. afhj~         c. .7  afg. .65  .3  .1         c. afg.      none: the end
    # afg. was not among the survivors of round 3 and is again in round 4: a finished branch stays in the pool.
    voted, parents = run(BeamSearch(n=4, width=2))
    assert parents == [["", "", "", ""], ["a", "a"], ["af", "af"], ["afh", "afh"]]
    assert voted == ["c.", "afg.", "afhi.", "afhj~"]


def test_paper_a_finished_survivor_can_be_outdone_by_live_candidates():
    # n = 2, width = 2, one survivor. With .6 a. leads round 1 and ends the search; with .4 b goes on, and a. is voted all the same.
    steps = {"": "a. b", "b": "c. d."}
    scores = {"a.": 0.6, "b": 0.5, "bc.": 0.9, "bd.": 0.1}
    assert run(BeamSearch(n=2, width=2), steps, scores) == (["a."], [["", ""]])
    scores["a."] = 0.4
    assert run(BeamSearch(n=2, width=2), steps, scores) == (["a.", "bc.", "bd."], [["", ""], ["b", "b"]])


def test_reference_a_selected_finished_branch_holds_its_place():
    # round  draws after  candidates          places left  kept       live
    # 1      4 x prompt   a b c. d            2            c. a       a
    # 2      a a          ae .6  af .8        1            af         af
    # 3      af af        afg. .65  afh .75   1            afh        afh      (afg. is lost)
    # 4      afh afh      afhi. .3 (afhj~     1            afhi.      none
    #                     is dropped unscored)
    voted, parents = run(BeamSearch(n=4, width=2, rules=REFERENCE), scores={k: v for k, v in SCORES.items() if "~" not in k})
    assert parents == [["", "", "", ""], ["a", "a"], ["af", "af"], ["afh", "afh"]]
    assert voted == ["c.", "afhi."]


def test_reference_drops_duplicates_and_truncated_steps_and_closes_a_childless_parent():
    # round 1: a a b~ c   -> the second a is a duplicate, b~ is truncated: a .5  c .6 -> both survive
    # round 2: c: d~ e~   -> nothing remains: c itself stands in, closed, with its .6
    #          a: f. f.   -> af. .4 once.  Pool c .6, af. .4: both hold their places, the end.
    steps = {"": "a a b~ c", "c": "d~ e~", "a": "f. f."}
    method = BeamSearch(n=4, width=2, rules=REFERENCE)
    result, rounds = play_method(method, scripted_policy(steps), scripted_prm({"a": 0.5, "c": 0.6, "af.": 0.4}))
    assert [expanded.parents for (expanded,) in rounds] == [["", "", "", ""], ["c", "c", "a", "a"]]
    assert solutions(result) == ["c", "af."]
    assert [branch.finish for branch in result] == [Finish.LENGTH, Finish.EOS]


def test_reference_keeps_truncated_first_steps_where_there_is_nothing_else():
    scores = {"a~": 0.1, "b~": 0.4, "c~": 0.2, "d~": 0.3}
    voted, parents = run(BeamSearch(n=4, width=2, rules=REFERENCE), {"": "a~ b~ c~ d~"}, scores)
    assert voted == ["b~", "d~"]
    assert len(parents) == 1


def test_reference_duplicates_count_among_siblings_only():
    steps = {"": "a b", "a": "x. x.", "b": "x. y."}
    scores = {"a": 0.5, "b": 0.4, "ax.": 0.3, "bx.": 0.3, "by.": 0.1}
    assert run(BeamSearch(n=2, width=1, rules=REFERENCE), steps, scores)[0] == ["ax.", "bx."]


def test_sal_finished_branches_leave_and_the_pool_is_refilled():
    # round  draws after   candidates                            leave            two best unfinished
    # 1      4 x prompt    a .5  b .4  c. .7  d .2               c.               a b
    # 2      a a b b       ae .6  af .8  bk .1  bl. .2           bl.              af ae
    # 3      af af ae ae   afg. .65  afh .75  aem~ .05  aen. .3  afg. aem~ aen.   afh
    # 4      4 x afh       .3  .1  .9  .35                       all four         none: the end
    # Nine have completed; the four best are voted.
    voted, parents = run(BeamSearch(n=4, width=2, rules=SAL))
    assert parents == [["", "", "", ""], ["a", "a", "b", "b"], ["af", "af", "ae", "ae"], ["afh"] * 4]
    assert voted == ["afhp.", "c.", "afg.", "afhq."]


def test_sal_refill_gives_the_rest_of_an_uneven_division_to_the_better_survivors():
    # n = 5, width = 1: five survivors wanted, three are unfinished; 5 draws for b .3, a .2, c .1 in this order: 2, 2, 1
    steps = {"": "a b c d. e.", "a": "g. h.", "b": "g. h.", "c": "g."}
    scores = {"a": 0.2, "b": 0.3, "c": 0.1, "d.": 0.5, "e.": 0.5} | dict.fromkeys(["ag.", "ah.", "bg.", "bh.", "cg."], 0.4)
    _, parents = run(BeamSearch(n=5, width=1, rules=SAL), steps, scores)
    assert parents[1] == ["b", "b", "a", "a", "c"]


def test_fewer_completed_than_n_are_listed_again_best_first():
    rules = replace(SAL, drop_duplicates=True)
    voted, _ = run(BeamSearch(n=4, width=2, rules=rules), {"": "a. a. b. a."}, {"a.": 0.5, "b.": 0.9})
    assert voted == ["b.", "a.", "b.", "a."]


@pytest.mark.parametrize("rules", [PAPER, SAL], ids=["paper", "sal"])
def test_duplicates_are_kept_and_are_branches_of_their_own(rules):
    result, _ = play_method(BeamSearch(n=4, width=4, rules=rules), scripted_policy({"": "a. a. a. a."}), scripted_prm({"a.": 0.5}))
    assert solutions(result) == ["a."] * 4
    assert len({branch.identity for branch in result}) == 4


@pytest.mark.parametrize(
    ("rules", "ref"),
    # after two steps: aa .4 ab .3 (from a .6), ba .2 bb .1 (from b .5)
    [(PAPER, ["aa", "ab", "ba", "bb"]), (REFERENCE, ["aa", "ab"]), (SAL, ["aa", "ab", "ba", "bb"])],
    ids=["paper", "reference", "sal"],
)
def test_at_the_step_limit_unfinished_branches_end_and_are_answers(rules, ref):
    steps = {"": "a b c d", "a": "a b", "b": "a b"}
    scores = {"a": 0.6, "b": 0.5, "c": 0.1, "d": 0.1, "aa": 0.4, "ab": 0.3, "ba": 0.2, "bb": 0.1}
    method = BeamSearch(n=4, width=2, rules=rules, max_steps=2)
    result, rounds = play_method(method, scripted_policy(steps), scripted_prm(scores))
    assert len(rounds) == 2
    assert solutions(result) == ref
    assert {branch.finish for branch in result} == {Finish.DEPTH}


def test_selection_is_over_the_whole_pool_and_not_parent_by_parent():
    steps = {"": "a b c d", "a": "e f", "b": "e f", "ae": "x. x.", "af": "x. x."}
    scores = {"a": 0.6, "b": 0.5, "c": 0.1, "d": 0.1, "ae": 0.9, "af": 0.8, "be": 0.7, "bf": 0.1, "aex.": 1, "afx.": 1}
    _, parents = run(BeamSearch(n=4, width=2), steps, scores)
    assert parents[2] == ["ae", "ae", "af", "af"]


def test_of_equal_scores_the_earlier_draw_survives():
    steps = {"": "a b c d", "a": "x. y.", "b": "x. y."}
    scores = dict.fromkeys(["a", "b", "c", "d", "ax.", "ay.", "bx.", "by."], 0.5)
    assert run(BeamSearch(n=4, width=2), steps, scores)[1][1] == ["a", "a", "b", "b"]


def test_of_a_finished_branch_and_an_equal_later_candidate_the_finished_one_survives():
    # n = 2, width = 2, one survivor: round 2 has b. .5 from round 1 and ac .5, so the search ends there
    steps, scores = {"": "a b.", "a": "c d"}, {"a": 0.6, "b.": 0.5, "ac": 0.5, "ad": 0.1}
    assert run(BeamSearch(n=2, width=2), steps, scores) == (["b."], [["", ""], ["a", "a"]])


@pytest.mark.parametrize(("by", "ref"), [("last", "by"), ("min", "cz"), ("mean", "ax")])
def test_the_aggregate_in_the_rules_selects(by, ref):
    # n = 3, width = 1: three paths side by side; the best is listed first in round 3.
    #        steps     last  min   mean
    # ax     .9  .6    .6    .6    .75
    # by     .4  .8    .8    .4    .6
    # cz     .7  .65   .65   .65   .675
    steps = {"": "a b c", "a": "x", "b": "y", "c": "z", "ax": ".", "by": ".", "cz": "."}
    scores = {"a": 0.9, "b": 0.4, "c": 0.7, "ax": 0.6, "by": 0.8, "cz": 0.65, "ax.": 0.0, "by.": 0.0, "cz.": 0.0}
    _, parents = run(BeamSearch(n=3, width=1, rules=replace(PAPER, selects_by=by)), steps, scores)
    assert parents[2][0] == ref


def test_n_must_be_a_multiple_of_width():
    with pytest.raises(MethodError, match=r"^n=6 must be a multiple of width=4: survivors are n // width$"):
        BeamSearch(n=6)
