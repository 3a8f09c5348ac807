import pytest

from tts_engine.branch import Branch, root_branch
from tts_engine.search.ranking import aggregate, divide, rank, repeat, top


def branch(name: str, *scores: float | None) -> Branch:
    node = root_branch(())
    for score in scores:
        node = Branch(node, (1,), name, identity=1, score=score)
    return node


def names(branches: list[Branch]) -> str:
    return "".join(b.text for b in branches)


def test_aggregates_of_a_path_worked_by_hand():
    scores = (0.9, 0.2, 0.7)
    assert aggregate(scores, "last") == 0.7
    assert aggregate(scores, "min") == 0.2
    assert aggregate(scores, "mean") == pytest.approx(0.6)


def test_each_aggregate_can_rank_differently():
    pool = [branch("a", 0.1, 0.9), branch("b", 0.6, 0.5), branch("c", 1.0, 0.4)]
    assert names(rank(pool, "last")) == "abc"
    assert names(rank(pool, "min")) == "bca"
    assert names(rank(pool, "mean")) == "cba"


def test_of_equal_scores_the_earlier_place_wins():
    pool = [branch("a", 0.5), branch("b", 0.7), branch("c", 0.5), branch("d", 0.7)]
    assert names(top(pool, 3, "last")) == "bda"
    assert names(top(pool, 9, "last")) == "bdac"
    assert top(pool, 0, "last") == []


@pytest.mark.parametrize("scores", [(), (None,), (0.5, None), (0.5, float("nan"))], ids=["root", "none", "gap", "nan"])
def test_a_path_without_all_its_scores_is_not_ranked(scores):
    with pytest.raises(AssertionError, match="score"):
        aggregate(scores, "last")


@pytest.mark.parametrize(
    ("total", "weights", "ref"),
    [
        (8, [1, 1], [4, 4]),
        (8, [1, 1, 1], [3, 3, 2]),
        (4, [0.7, 0.2, 0.1], [3, 1, 0]),  # exact 2.8, 0.8, 0.4: floors 2, 0, 0 and the two largest remainders
        (5, [0.5, 0.5, 0.0], [3, 2, 0]),
        (0, [1, 2], [0, 0]),
        (7, [], []),
    ],
)
def test_a_budget_is_divided_by_largest_remainder(total, weights, ref):
    assert divide(total, weights) == ref


def test_repeated_entries_keep_siblings_side_by_side():
    assert names(repeat([branch("a", 1), branch("b", 1), branch("c", 1)], [2, 0, 1])) == "aac"
