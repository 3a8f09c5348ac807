import pytest

from tts_engine.branch import Branch, Finish, child_identity, root_branch
from tts_engine.search import make_method
from tts_engine.search.driver import Driver
from tts_engine.search.requests import Expand, Join, Outlook, Score
from tts_engine.testing import play, random_policy, random_prm

ROOT = root_branch((1, 2, 3))
POLICY, PRM = random_policy(0, p_finish=0.0), random_prm(0)


def children_of(ask, finish=None):
    return [Branch(d.branch, (7,), "x", d.identity, d.lane, d.draw, finish) for d in ask.draws]


def numbers(rounds):
    return [[(d.lane, d.draw) for d in expanded.draws] for r in rounds for expanded in r]


def one_step():
    return (yield Expand([ROOT]))


def test_each_entry_is_its_parents_next_draw_and_a_second_visit_draws_anew():
    def program():
        first = yield Expand([ROOT, ROOT])
        yield Expand([first[0], ROOT, first[0]])
        again = yield Expand([ROOT])
        return again

    result, rounds = play(program(), POLICY, PRM)
    assert numbers(rounds) == [[((), 0), ((), 1)], [((), 0), ((), 2), ((), 1)], [((), 3)]]
    assert result[0].identity == child_identity(ROOT.identity, (), 3)


def test_a_scored_or_closed_copy_of_a_branch_continues_the_same_numbering():
    def program():
        (child,) = yield Expand([ROOT])
        yield Expand([child])
        (scored,) = yield Score([child])
        return (yield Expand([scored]))

    _, rounds = play(program(), POLICY, PRM)
    assert numbers(rounds)[1:] == [[((), 0)], [((), 1)]]


def test_joined_programs_draw_in_nested_lanes_that_never_restart():
    def leaf():
        return (yield Expand([ROOT, ROOT]))

    def pair():
        return sum((yield Join([leaf(), leaf()])), [])

    def program():
        both = yield Join([pair(), leaf()])
        again = yield Join([leaf()])
        return [*both[0], *both[1], *again[0]]

    result, rounds = play(program(), POLICY, PRM)
    assert numbers(rounds) == [
        [((0, 0), 0), ((0, 0), 1)],
        [((0, 1), 0), ((0, 1), 1)],
        [((1,), 0), ((1,), 1)],
        [((0,), 0), ((0,), 1)],
    ]
    assert [(branch.lane, branch.draw) for branch in result] == [pair for row in numbers(rounds) for pair in row]
    assert len({branch.identity for branch in result}) == 8


def test_a_second_join_continues_the_lanes_of_the_first():
    def leaf():
        return (yield Expand([ROOT]))

    def program():
        yield Join([leaf(), leaf()])
        return (yield Join([leaf(), leaf()]))[1]

    _, rounds = play(program(), POLICY, PRM)
    assert numbers(rounds) == [[((0,), 0)], [((1,), 0)], [((0,), 1)], [((1,), 1)]]


def test_programs_of_a_join_go_on_without_waiting_for_each_other():
    def walk(steps):
        branch = ROOT
        for _ in range(steps):
            (branch,) = yield Expand([branch])
        return [branch]

    def program():
        return sum((yield Join([walk(1), walk(3)])), [])

    driver = Driver(program())
    one, three = driver.asks()
    for _ in range(3):
        assert not driver.stirred
        driver.answer(three, children_of(three))
        assert driver.stirred  # though the last time nothing is asked: a program has returned
        new = driver.asks()
        three = new[0] if new else None
    assert three is None and not driver.done
    driver.answer(one, children_of(one))
    assert [branch.depth for branch in driver.result] == [1, 3]


def test_later_steps_of_a_trajectory_take_their_numbers_from_the_driver():
    def program():
        ends = yield Expand([ROOT, ROOT], to_end=True)
        return (yield Expand([ends[0].parent]))

    driver = Driver(program())
    (ask,) = driver.asks()
    assert [d.to_end for d in ask.draws] == [True, True]
    firsts = children_of(ask)
    seconds = [driver.next_draw(first, draw.lane) for first, draw in zip(firsts, ask.draws, strict=True)]
    assert [(d.draw, d.identity) for d in seconds] == [(0, child_identity(first.identity, (), 0)) for first in firsts]
    driver.answer(ask, [Branch(d.branch, (7,), "x", d.identity, finish=Finish.EOS) for d in seconds])
    (ask,) = driver.asks()
    assert ask.draws[0].draw == 1  # the trajectory's own second step was draw 0 of the same parent


def test_a_step_that_will_be_scored_is_told_when_it_closes_and_once():
    def program():
        yield Expand([ROOT, ROOT], outlook=Outlook(scored=lambda step: step.finish is not Finish.LENGTH))
        return (yield Expand([ROOT]))

    driver = Driver(program())
    (ask,) = driver.asks()
    kept, cut = children_of(ask)[0], children_of(ask, Finish.LENGTH)[1]
    driver.close_step(ask, kept)
    assert driver.stirred and driver.arrived() == [kept] and driver.arrived() == []
    assert driver.asks() == [] and not driver.stirred
    driver.close_step(ask, cut)
    assert not driver.stirred
    driver.answer(ask, [kept, cut])
    (ask,) = driver.asks()
    driver.close_step(ask, children_of(ask)[0])  # nothing is said of what becomes of it
    assert driver.arrived() == []


@pytest.mark.parametrize(
    ("method", "rules", "ended"),
    [("majority", {}, None), ("cot", {}, None), ("best_of_n", {}, "all"), ("beam", {}, "all"), ("rebase", {}, "all"),
     ("dvts", {}, "all"), ("beam", {"drop_truncated": True}, "kept"), ("dvts", {"rules": "reference"}, "kept")],
)  # fmt: skip
def test_methods_say_which_steps_they_will_have_scored(method, rules, ended):
    budget = {} if method == "cot" else {"n": 8}
    driver = Driver(make_method(method, **budget, **({} if method in ("majority", "cot") else rules)).program(ROOT))
    for ask in driver.asks():
        for finish in (None, Finish.EOS, Finish.LENGTH):
            step = children_of(ask, finish)[0]
            driver.close_step(ask, step)
            scored = ended == "all" or (ended == "kept" and finish is not Finish.LENGTH)
            assert driver.arrived() == [step] * scored


def test_draws_are_foreseen_as_they_will_be_asked_for():
    def program():
        first = yield Expand([ROOT, ROOT])
        return (yield Join([again(first[1])]))[0]

    def again(branch):
        yield Expand([branch])
        return (yield Expand([branch, branch, ROOT]))

    driver = Driver(program())
    (ask,) = driver.asks()
    child = children_of(ask)[1]
    ahead = driver.foreseen(child, (0,), 3)
    driver.answer(ask, children_of(ask))
    for count in (1, 2):
        (ask,) = driver.asks()
        assert [(d.lane, d.draw, d.identity) for d in ask.draws[:count]] == [(d.lane, d.draw, d.identity) for d in ahead[:count]]
        del ahead[:count]
        driver.answer(ask, children_of(ask))
    assert [d.draw for d in driver.foreseen(ROOT, (), 2)] == [2, 3] and not ahead


def test_a_round_knows_whose_scores_are_missing_and_when_it_is_over():
    outlook = Outlook(lambda child: child.draw != 3, lambda scored: sorted(scored, key=lambda child: -child.score)[:1])

    def program():
        children = yield Expand([ROOT] * 4, outlook=outlook)
        yield Expand(children[:2])
        return []

    driver, scores = Driver(program()), {}
    (ask,) = driver.asks()
    children, round = children_of(ask), ask.round
    for place, worth in ((0, False), (1, True), (2, True), (3, False)):
        driver.close_step(ask, children[place])
        round.look(lambda child: scores.get(child.draw))
        assert (round.worth_reading, round.num_open) == (worth, 3 - place)
        assert [child.draw for child in round.unread] == [0, 1, 2][: place + 1]
    for draw, score, best in ((1, 0.25, 1), (0, 0.5, 0), (2, 0.3, 0)):
        scores[draw] = score
        round.look(lambda child: scores.get(child.draw))
        assert [(child.draw, child.score) for child in round.entries] == [(best, scores[best])]
    assert not round.unread and not round.over
    driver.answer(ask, children)
    assert round.over and driver.asks()[0].round is None


def test_closing_ends_every_round():
    driver = Driver(make_method("dvts", n=8).program(ROOT))
    rounds = [ask.round for ask in driver.asks()]
    driver.close()
    assert [round.over for round in rounds] == [True, True]


def test_empty_requests_are_answered_at_once():
    def program():
        assert (yield Expand([])) == []
        assert (yield Score([])) == []
        assert (yield Join([])) == []
        return []

    driver = Driver(program())
    assert driver.done and driver.result == [] and driver.asks() == []


def test_asks_are_handed_out_once_and_answered_once():
    def program():
        yield Expand([ROOT])
        return (yield Expand([ROOT]))

    driver = Driver(program())
    (ask,) = driver.asks()
    assert (ask.kind, driver.asks()) == ("expand", [])
    driver.answer(ask, children_of(ask))
    with pytest.raises(AssertionError, match="not waiting"):
        driver.answer(ask, children_of(ask))
    with pytest.raises(AssertionError, match="not done"):
        _ = driver.result


def test_wrong_answers_are_caught():
    def program():
        children = yield Expand([ROOT, ROOT])
        return (yield Score(children))

    driver = Driver(program())
    (ask,) = driver.asks()
    with pytest.raises(AssertionError, match="an ask of 2 was answered with 1 branches"):
        driver.answer(ask, children_of(ask)[:1])
    with pytest.raises(AssertionError, match="identity of its draw"):
        driver.answer(ask, children_of(ask)[::-1])
    children = children_of(ask)
    driver.answer(ask, children)
    (ask,) = driver.asks()
    with pytest.raises(AssertionError, match="without a score"):
        driver.answer(ask, children)


def test_a_failure_is_something_that_happened():
    driver = Driver(one_step())
    driver.asks()
    driver.fail(ValueError("no"))
    assert driver.stirred
    with pytest.raises(ValueError, match="no"):
        driver.asks()


def test_an_unfinished_trajectory_is_not_an_answer_to_to_end():
    def program():
        return (yield Expand([ROOT], to_end=True))

    driver = Driver(program())
    (ask,) = driver.asks()
    with pytest.raises(AssertionError, match="has not ended"):
        driver.answer(ask, children_of(ask))


def test_expanding_a_finished_branch_is_a_bug_of_the_method():
    def program():
        (child,) = yield Expand([ROOT])
        return (yield Expand([child]))

    driver = Driver(program())
    (ask,) = driver.asks()
    with pytest.raises(AssertionError, match="ended with eos cannot be expanded"):
        driver.answer(ask, children_of(ask, Finish.EOS))


def test_closing_closes_every_generator_under_way():
    closed = []

    def leaf(name):
        try:
            return (yield Expand([ROOT]))
        finally:
            closed.append(name)

    def program():
        try:
            return sum((yield Join([leaf("first"), leaf("second")])), [])
        finally:
            closed.append("outer")

    driver = Driver(program())
    first, second = driver.asks()
    driver.answer(first, children_of(first))
    driver.close()
    assert closed == ["first", "second", "outer"]
    with pytest.raises(AssertionError, match="not waiting"):
        driver.answer(second, children_of(second))
