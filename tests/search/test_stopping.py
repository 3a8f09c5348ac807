"""Against the votes themselves: what is called settled never changes, or as rarely as is said."""

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_engine.search.stopping import MaxVote, SumVote
from tts_engine.search.voting import best, majority, vote

ANSWERS = st.sampled_from(["1", "2", "3", "", None])
WEIGHTS = st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]) | st.floats(0, 1)
DRAWS = st.lists(st.tuples(ANSWERS, WEIGHTS), min_size=1, max_size=12)


def counted(polls, draws):
    for answer, weight in draws:
        polls.count(answer, weight)
    return polls


def first_settled(polls, answers, weights, batch=1):
    """Draws until it is settled, and its leader then."""
    for i, (answer, weight) in enumerate(zip(answers, weights, strict=True), start=1):
        polls.count(answer, weight)
        if i % batch == 0 and polls.settled:
            break
    return polls.drawn, polls.leader


@given(DRAWS, st.integers(0, 12))
def test_a_vote_that_is_settled_does_not_change(draws, made):
    answers, weights = zip(*draws, strict=True)
    votes = [
        (SumVote(len(draws)), [1.0] * len(draws), vote),
        (SumVote(len(draws)), weights, vote),
        (MaxVote(len(draws)), weights, best),
    ]
    for polls, own, whole in votes:
        counted(polls, list(zip(answers, own, strict=True))[:made])
        if polls.settled:
            assert polls.leader == whole(answers, own)
        assert polls.leader == whole(answers[:made], own[:made])


@pytest.mark.parametrize("total", [1, 4, 5])
def test_a_vote_that_can_change_is_not_settled(total):
    """Both ways, by every majority that may come of every beginning, answers that nobody gave yet among them."""
    for made in range(total):
        for begun in product(["a", "b", None], repeat=made):
            polls = counted(SumVote(total), [(answer, 1.0) for answer in begun])
            ends = {majority([*begun, *rest]) for rest in product(["a", "b", "new"], repeat=total - made)}
            assert polls.settled == (len(ends) == 1), begun


@pytest.mark.parametrize(
    ("total", "draws", "settled"),
    [
        (4, [("a", 1.0), ("a", 1.0)], True),  # a tie serves who was seen first
        (4, [("b", 0.0), ("a", 1.0), ("a", 1.0)], True),
        (4, [("b", 0.5), ("a", 1.0), ("a", 0.5)], False),  # a tie serves b
        (4, [("b", 0.5), ("a", 1.0), ("a", 0.75)], True),
        (3, [("a", 0.1), ("a", 0.2)], False),
        (3, [(None, 1.0), ("", 1.0)], False),
        (2, [(None, 1.0), ("", 1.0)], True),
    ],
)
def test_weights_and_ties(total, draws, settled):
    assert counted(SumVote(total), draws).settled == settled


SHARES = {
    "sure": [1.0], "likely": [0.8, 0.2], "close": [0.55, 0.45], "even": [0.5, 0.5], "three": [0.4, 0.3, 0.3],
    "scattered": [0.1] * 10, "one of many": [0.3] + [0.05] * 14, "none": [0.4, 0.3, 0.3, 0.0],
}  # fmt: skip


def sampled(rng, shares, total, none):
    drawn = rng.choices(range(len(shares)), shares, k=total)
    return [None if none and i == 1 else str(i) for i in drawn]


@pytest.mark.parametrize("weighted", [False, True], ids=["majority", "weighted"])
@pytest.mark.parametrize(("bound", "batch", "total"), [(0.1, 1, 32), (0.3, 4, 24)])
def test_no_more_votes_change_than_the_bound_says(weighted, bound, batch, total):
    runs, draws = 150, {}
    for name, shares in SHARES.items():
        rng, changed, draws[name] = random.Random(f"{name} {bound}"), 0, 0
        for _ in range(runs):
            answers = sampled(rng, shares, total, none=name == "none")
            weights = [rng.betavariate(4, 1) if a == "0" else rng.random() for a in answers] if weighted else [1.0] * total
            drawn, leader = first_settled(SumVote(total, bound), answers, weights, batch)
            changed += leader != vote(answers, weights)
            draws[name] += drawn / runs
        deviation = math.sqrt(runs * bound * (1 - bound))
        assert changed <= runs * bound + 2.5 * deviation, name
    assert draws["sure"] <= (11 if bound == 0.1 else 8) < draws["even"]


def test_the_bound_is_close_where_it_is_hard():
    """A vote that is as near as can be is called wrongly now and then: the bound is used, not only kept."""
    rng, wrong = random.Random(1), 0
    for _ in range(300):
        answers = ["a"] * 16 + ["b"] * 17
        rng.shuffle(answers)
        wrong += first_settled(SumVote(33, 0.3), answers, [1.0] * 33)[1] != majority(answers)
    assert 0.05 < wrong / 300 <= 0.3


def test_the_largest_weight_is_settled_late_or_by_one():
    for bound, drawn in [(0.0, 20), (0.1, 18), (0.5, 10)]:
        assert first_settled(MaxVote(20, bound), ["a"] * 20, [0.5] * 20) == (drawn, "a")
    assert first_settled(MaxVote(20), ["a", "b", "a"], [0.5, 1.0, 0.4])[0] == 2
    rng = random.Random(2)
    changed = 0
    for _ in range(400):
        answers, weights = [str(i) for i in range(20)], [rng.random() for _ in range(20)]
        changed += first_settled(MaxVote(20, 0.2), answers, weights)[1] != best(answers, weights)
    assert 0.13 < changed / 400 < 0.27


def test_doubt_is_greatest_where_two_answers_are_level():
    def doubt(*answers):
        return counted(SumVote(64), [(answer, 1.0) for answer in answers]).doubt

    assert doubt() == doubt("a", "b") == doubt(None) == 0.5
    assert doubt("a", "b") > doubt("a", "a", "b") > doubt("a") > doubt("a", "a") > doubt("a", "a", "a", "a")
    assert doubt("a", "a", "a", "a") == pytest.approx(1 / 32, abs=0.01)  # the posterior's, of an even prior
    agreed, split = (counted(MaxVote(8), draws).doubt for draws in ([("a", 0.5)] * 4, [("a", 0.5), ("b", 0.4)] * 2))
    assert agreed < split
