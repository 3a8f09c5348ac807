"""What arms say when they are held against one another: by records whose accuracies and FLOPs are known."""

import json

import pytest

from tts_engine.report.arms import Difficulty, study
from tts_engine.report.comparison import accuracy_rows, as_dict, gain_rows, largest, ledger_rows, size_rows, winners
from tts_engine.report.intervals import CANNOT_TELL, FAILS, HOLDS, paired_difference


def test_accuracy_and_flops_are_those_of_the_records(line_up):
    rows = {(row.arm.policy, row.arm.label): row for row in accuracy_rows(study(line_up, {}))}
    beam = rows["small", "beam n=4"]
    assert (beam.share.accuracy, beam.share.gflop, beam.policy_gflop, beam.prm_gflop) == (0.75, 0.008, 0.004, 0.004)
    assert beam.by["level"]["1"].problems == beam.by["level"]["2"].problems == 20
    assert beam.by["level"]["1"].accuracy == 0.75 and beam.by["level"]["1"].gflop == 0.008
    assert rows["large", "cot"].prm_gflop == 0 and rows["large", "cot"].share.interval == pytest.approx((0.352, 0.648), abs=1e-3)


def test_a_bin_without_problems_has_no_accuracy(line_up):
    policy = line_up[0].description["policy"]["sha256"]
    none = Difficulty(policy, ("easy", "hard"), {f"p{i:03}": "hard" for i in range(40)})
    row = accuracy_rows(study(line_up, {}, [none]))[0]
    assert row.by["pass@1"]["easy"].accuracy is row.by["pass@1"]["easy"].gflop is None
    assert row.by["pass@1"]["hard"].accuracy == 0.25


def test_small_policies_are_held_against_larger_ones_chain_of_thought(line_up):
    rows = size_rows(study(line_up, {}))
    assert [(row.small.label, row.large.policy, row.cost) for row in rows] == [
        ("cot", "large", 0.1), ("majority n=16", "large", 1.6), ("beam n=16", "large", pytest.approx(3.2)),
    ]  # fmt: skip
    cot, majority, beam = (row.verdict for row in rows)
    assert (cot.difference, majority.difference, beam.difference) == (-0.25, 0.25, 0.5)
    assert (cot.outcome, majority.outcome, beam.outcome) == (FAILS, HOLDS, HOLDS)
    apart = paired_difference([1.0] * 40, [i < 20 for i in range(40)])
    assert beam.interval == pytest.approx(apart[1:], abs=0.02)


def test_policies_of_one_size_are_not_small_and_large(run_of):
    runs = [run_of("cot", 1, [1, 0], 1), run_of("cot", 1, [1, 1], 1, policy="twin")]
    assert not size_rows(study(runs, {}))


def test_gains_are_over_cot_and_over_a_majority_of_as_many_draws(line_up):
    majority, beam = gain_rows(study(line_up, {}))
    assert (majority.arm.label, majority.over_cot.difference, majority.relative, majority.over_majority) == (
        "majority n=16",
        0.5,
        2.0,
        None,
    )
    assert majority.factor is None
    assert (beam.over_cot.difference, beam.relative, beam.over_majority.difference) == (0.75, 3.0, 0.25)
    assert (beam.over_cot.outcome, beam.over_majority.outcome) == (HOLDS, HOLDS)
    assert beam.factor.estimate == pytest.approx(2.0)  # 75 % by 8 MFLOP, majority by 16


def test_what_was_not_run_is_no_gain(run_of):
    [row] = gain_rows(study([run_of("beam", 4, [1, 0], 1, prm="judge")], {}))
    assert row.over_cot is row.over_majority is row.relative is row.factor is None


def test_a_baseline_that_solves_nothing_has_no_relative_gain(run_of):
    rows = gain_rows(study([run_of("cot", 1, [0, 0], 1), run_of("majority", 4, [1, 0], 4)], {}))
    assert rows[0].relative is None and rows[0].over_cot.difference == 0.5


def test_who_wins_and_who_is_tied(run_of):
    """Beam solves 30 of 40, dvts the same and one more, majority 10 of them: dvts wins, tied with beam alone."""
    runs = [
        run_of("cot", 1, [i < 10 for i in range(40)], 1),
        run_of("majority", 4, [i < 10 for i in range(40)], 4),
        run_of("beam", 4, [i < 30 for i in range(40)], 8, prm="judge"),
        run_of("dvts", 4, [i < 31 for i in range(40)], 8, prm="judge"),
    ]
    whole, first, second = winners(study(runs, {}))
    assert (whole.grouping, whole.problems, whole.best.method, whole.accuracy) == ("all", 40, "dvts", 31 / 40)
    assert [arm.method for arm in whole.tied] == ["beam"] and whole.rivals == 4
    assert (first.grouping, first.bin, second.bin, first.problems) == ("level", "1", "2", 20)


def test_of_equals_the_cheaper_wins_and_one_problem_tells_nothing(run_of):
    runs = [run_of("beam", 4, [1], 8, prm="judge"), run_of("dvts", 4, [1], 7, prm="judge"), run_of("majority", 4, [0], 1)]
    whole, *_ = winners(study(runs, {}))
    assert whole.best.method == "dvts" and {arm.method for arm in whole.tied} == {"beam", "majority"}
    assert [row.over_majority.outcome for row in gain_rows(study(runs, {})) if row.over_majority] == [CANNOT_TELL] * 2


def test_nobody_wins_what_nobody_solves(run_of):
    whole, *_ = winners(study([run_of("beam", 4, [0, 0], 8, prm="judge"), run_of("majority", 4, [0, 0], 4)], {}))
    assert whole.best is None and not whole.tied


def test_each_prm_has_its_winners_beside_what_takes_none(run_of):
    runs = [run_of("majority", 4, [1, 0], 1), *(run_of("beam", 4, [1, 1], 2, prm=prm) for prm in ("good", "poor"))]
    rows = [row for row in winners(study(runs, {})) if row.grouping == "all"]
    assert [(row.prm, row.rivals) for row in rows] == [("good", 2), ("poor", 2)]
    alone = winners(study([run_of("majority", 4, [1, 0], 4), run_of("cot", 1, [1, 0], 1)], {}))
    assert [(row.prm, row.best.method) for row in alone if row.grouping == "all"] == [(None, "cot")]


def test_the_ledger_is_of_a_problem(line_up):
    row = ledger_rows(study(line_up, {}))[-2]
    assert (row.arm.label, row.seconds, row.useful, row.drawn) == ("beam n=16", 0.5, 1.0, 160)
    assert row.phases == pytest.approx({"policy": 0.6, "PRM": 0.2, "grading": 0.2, "rest": 0.0})
    assert (row.kv_distinct, row.kv_logical, row.prm_read) == (2000, 4000, 160_000)


def test_the_largest_budgets_are_one_an_arm(line_up):
    assert [arm.label for arm in largest(study(line_up, {}).arms)] == ["cot", "majority n=16", "beam n=16", "cot"]


def test_all_of_it_is_json(line_up):
    told = json.loads(json.dumps(as_dict(study(line_up, {})), allow_nan=False))
    assert [len(told[table]) for table in ("accuracy", "sizes", "gain", "winners", "ledger")] == [6, 3, 2, 6, 6]
    assert told["accuracy"][4]["accuracy"] == 1.0 and told["gain"][1]["less_compute"]["estimate"] == pytest.approx(2.0)
    assert told["winners"][0]["best"] == {"policy": "small", "prm": "judge", "method": "beam", "n": 4}
