from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_engine.branch import Branch, Finish, root_branch
from tts_engine.search import BestOfN, Driver, Majority, make_method
from tts_engine.search.voting import CHOICES, all_aggregates
from tts_engine.testing import play_method, random_policy, random_prm, scripted_policy


def no_prm(step):
    raise AssertionError("this vote asks no PRM")


def answered(result, vote):
    scores = None if vote == "majority" else [branch.scores for branch in result]
    return all_aggregates([branch.text for branch in result], scores)[vote]


@given(
    seed=st.integers(0, 2**32), vote=st.sampled_from(CHOICES), n=st.integers(1, 24), batch=st.integers(1, 9),
    letters=st.sampled_from(["a", "ab", "abcdef"]),
)  # fmt: skip
def test_its_draws_are_the_first_of_all_n_and_its_answer_is_theirs(seed, vote, n, batch, letters):
    policy, prm = random_policy(seed, p_finish=0.5, letters=letters), no_prm if vote == "majority" else random_prm(seed, levels=9)
    fixed, _ = play_method((Majority if vote == "majority" else BestOfN)(n=n), policy, prm)
    result, rounds = play_method(make_method("adaptive", n=n, vote=vote, batch=batch), policy, prm)
    assert [branch.identity for branch in result] == [branch.identity for branch in fixed[: len(result)]]
    assert [branch.scores for branch in result] == [branch.scores for branch in fixed[: len(result)]]
    assert answered(result, vote) == answered(fixed, vote)
    sizes = [len(expanded.draws) for asked in rounds for expanded in asked]
    assert sum(sizes) == len(result) and set(sizes[:-1]) <= {batch} and sizes[-1] <= batch


def test_it_stops_as_soon_as_the_vote_cannot_change():
    policy = scripted_policy({"": "a. " * 32})
    for bound, drawn in [(0.0, 16), (0.05, 8), (0.5, 4)]:
        assert len(play_method(make_method("adaptive", n=32, bound=bound), policy, no_prm)[0]) == drawn
    assert len(play_method(make_method("adaptive", n=32, vote="last_max", bound=0.5), policy, random_prm(0, 2))[0]) <= 16


def test_only_a_search_with_a_budget_may_be_refused_draws():
    def asks(budget, answers):
        method = make_method("adaptive", n=12, batch=4, budget=budget)
        driver = Driver(method.program(root_branch(())), lambda branches: [branch.text for branch in branches])
        doubts = []
        for text in answers:
            [ask] = driver.asks()
            doubts.append(ask.doubt)
            driver.answer(ask, [Branch(draw.branch, (1,), text, draw.identity, draw.lane, draw.draw, Finish.EOS)
                                for draw in ask.draws] if text else [])  # fmt: skip
        return driver, doubts

    driver, doubts = asks("60s", ["x", "y", ""])
    assert doubts[0] is None and 0 < doubts[1] < doubts[2] == 0.5
    assert driver.done and [branch.text for branch in driver.result] == ["x"] * 4 + ["y"] * 4
    assert asks(None, "xy")[1] == [None, None]
    with pytest.raises(AssertionError, match="an ask of 4 was answered with 0 branches"):
        asks(None, ["x", ""])


def test_a_budget_is_part_of_its_description():
    method = make_method("adaptive", n=4, budget="2e9flops")
    assert method.shared_budget.amount == 2e9 and replace(method, budget=None).shared_budget is None
