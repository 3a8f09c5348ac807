from tts_engine.branch import Finish
from tts_engine.search import BestOfN, Cot, Majority
from tts_engine.testing import play_method, random_policy, random_prm, scripted_policy, scripted_prm, solutions

STEPS = {"": "a b. c", "a": "d e.", "ad": "f~"}


def no_prm(step):
    raise AssertionError("this method asks no PRM")


def test_chain_of_thought_is_one_greedy_trajectory():
    result, rounds = play_method(Cot(), scripted_policy(STEPS), no_prm)
    assert solutions(result) == ["adf~"]
    assert len(rounds) == 1
    assert Cot().temperature == 0.0


def test_majority_draws_n_whole_trajectories_and_scores_none():
    result, rounds = play_method(Majority(n=2), scripted_policy(STEPS), no_prm)
    assert solutions(result) == ["adf~", "b."]
    assert [len(expanded.draws) for r in rounds for expanded in r] == [2]


def test_best_of_n_scores_every_step_of_each_trajectory():
    prm = scripted_prm({"a": 0.9, "ad": 0.8, "adf~": 0.7, "b.": 0.6})
    result, _ = play_method(BestOfN(n=2), scripted_policy(STEPS), prm)
    assert [branch.scores for branch in result] == [(0.9, 0.8, 0.7), (0.6,)]


def test_trajectories_end_at_the_step_limit():
    result, _ = play_method(BestOfN(n=8, max_steps=3), random_policy(1, p_finish=0.0), random_prm(1))
    assert [(branch.depth, branch.finish) for branch in result] == [(3, Finish.DEPTH)] * 8


def test_the_same_trajectories_whatever_n():
    small, _ = play_method(Majority(n=4), random_policy(5), no_prm)
    large, _ = play_method(Majority(n=16), random_policy(5), no_prm)
    assert solutions(small) == solutions(large)[:4]
