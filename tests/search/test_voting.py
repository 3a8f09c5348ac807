import pytest

from tts_engine.search.voting import all_aggregates, best, majority, vote


def test_majority_counts_and_ties_go_to_the_answer_seen_first():
    assert majority(["4", "5", "5"]) == "5"
    assert majority(["4", "5", "5", "4"]) == "4"


def test_a_vote_sums_weights_within_each_answer():
    # 5: 0.6; 4: 0.35 + 0.3 = 0.65
    assert vote(["5", "4", "4"], [0.6, 0.35, 0.3]) == "4"
    # 5: 0.7; 4: 0.35 + 0.3 = 0.65, however many they are
    assert vote(["5", "4", "4"], [0.7, 0.35, 0.3]) == "5"
    assert best(["5", "4", "4"], [0.6, 0.35, 0.3]) == "5"


def test_the_best_of_equal_weights_is_the_one_seen_first():
    assert best(["4", "5"], [0.5, 0.5]) == "4"
    assert vote(["4", "5"], [0.0, 0.0]) == "4"


def test_a_vote_does_not_depend_on_the_order_of_summing():
    weights = [0.1, 0.2, 0.3, 0.7, 1e-17]
    answers = ["a"] * len(weights)
    rival = sum(sorted(weights))
    assert vote([*answers, "b"], [*weights, rival]) == vote([*answers[::-1], "b"], [*weights[::-1], rival])


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_trajectory_without_an_answer_takes_no_part(nothing):
    answers = [nothing, nothing, "7"]
    assert majority(answers) == "7"
    assert best(answers, [0.9, 0.8, 0.1]) == "7"
    assert vote(answers, [0.9, 0.8, 0.1]) == "7"


def test_where_no_trajectory_holds_an_answer_there_is_none():
    assert majority([None, ""]) is None
    assert best(["", None], [0.2, 0.9]) is None
    assert set(all_aggregates([], []).values()) == {None}


def test_any_hashable_answer_can_be_voted():
    assert majority([(1, 2), 0, (1, 2)]) == (1, 2)
    assert majority([0, 0, "1"]) == 0


def test_all_seven_aggregates_worked_by_hand():
    # answer  steps       last  min   mean
    # A       .1 .95      .95   .1    .525
    # B       .5 .6       .6    .5    .55
    # B       .3 .5       .5    .3    .4
    # C       .8 .7       .7    .7    .75
    # D       .1 .4       .4    .1    .25      D has the most trajectories and no weight
    # D       .1 .1       .1    .1    .1
    # D       .1 .1       .1    .1    .1
    # sums: last A .95  B 1.1  C .7  D .6 | min A .1  B .8  C .7  D .3 | mean A .525  B .95  C .75  D .45
    answers = ["A", "B", "B", "C", "D", "D", "D"]
    scores = [(0.1, 0.95), (0.5, 0.6), (0.3, 0.5), (0.8, 0.7), (0.1, 0.4), (0.1, 0.1), (0.1, 0.1)]
    assert all_aggregates(answers, scores) == {
        "majority": "D",
        "last_max": "A",
        "last_vote": "B",
        "min_max": "C",
        "min_vote": "B",
        "mean_max": "C",
        "mean_vote": "B",
    }


def test_a_path_of_one_step_has_one_score_under_every_aggregate():
    outcomes = all_aggregates(["A", "B", "B"], [(0.9,), (0.3,), (0.5,)])
    assert outcomes.pop("majority") == "B"
    assert set(outcomes.values()) == {"A"}


def test_without_a_prm_there_is_only_the_majority():
    assert all_aggregates(["1", "2", "2"], None) == {"majority": "2"}


def test_answers_and_scores_must_pair_up():
    with pytest.raises(ValueError):
        vote(["1"], [0.5, 0.5])
