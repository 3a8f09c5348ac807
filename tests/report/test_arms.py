"""Runs as a report compares them."""

import pytest

from tts_engine.errors import RunError
from tts_engine.report.arms import Difficulty, share_interval, study
from tts_engine.report.intervals import bootstrap, wilson


def shape(found):
    return [(arm.policy, arm.prm, arm.method, arm.n) for arm in found.arms]


def test_arms_stand_by_size_prm_method_and_budget_whatever_the_order_of_runs(line_up):
    ordered = [("small", None, "cot", 1), ("small", None, "majority", 4), ("small", None, "majority", 16),
               ("small", "judge", "beam", 4), ("small", "judge", "beam", 16), ("large", None, "cot", 1)]  # fmt: skip
    assert shape(study(line_up, {})) == shape(study(line_up[::-1], {})) == ordered
    found = study(line_up, {})
    assert (found.policies, found.prms, found.methods) == (["small", "large"], ["judge"], ["cot", "majority", "beam"])


def test_an_arm_has_the_accuracy_and_the_flops_of_its_run(line_up):
    *_, beam, large = study(line_up, {}).arms
    assert (beam.accuracy, beam.gflop, beam.flops[0], beam.interval) == (1.0, 0.032, 32_000_000, wilson(40, 40))
    assert (large.accuracy, large.gflop, sum(large.solved)) == (0.5, 0.01, 20)
    assert (beam.label, large.label) == ("beam n=16", "cot")


def test_seeds_of_one_arm_are_one_arm_and_each_problem_brings_its_mean(run_of):
    runs = [run_of("majority", 4, solved, 100, seed=seed) for seed, solved in enumerate([[1, 1, 0, 0], [1, 0, 0, 0]])]
    [arm] = study(runs, {}).arms
    assert arm.seeds == (0, 1) and arm.solved == (1.0, 0.5, 0.0, 0.0) and arm.accuracy == 0.375
    assert arm.flops == (100.0,) * 4 and arm.searches == 8 and arm.gflop == pytest.approx(1e-7)
    assert arm.interval == bootstrap(arm.solved).interval() != wilson(2, 4)


def test_settings_that_differ_make_arms_of_their_own_and_name_them(run_of):
    runs = [run_of("beam", 4, [1, 0], 1, prm="judge", settings={"width": width}) for width in (2, 4)]
    assert [arm.method for arm in study(runs, {}).arms] == ["beam (width=2)", "beam (width=4)"]
    int8 = run_of("cot", 1, [1, 0], 1)
    int8.description["engine"]["dtype"] = "int8"
    assert [arm.method for arm in study([run_of("cot", 1, [1, 0], 1), int8], {}).arms] == [
        "cot (dtype=float32)",
        "cot (dtype=int8)",
    ]


def test_a_tree_that_another_prm_read_is_no_search_by_it(run_of):
    runs = [run_of(method, 4, [1, 0], 1, prm="judge") for method in ("beam", "best_of_n")]
    runs[0].description["rescores"] = {"name": "other"}  # as rescore writes it
    runs[1].description["derived"] = {"made": "rescored"}  # as a sweep does
    arms = study([*runs, run_of("majority", 4, [1, 0], 1)], {}).arms
    assert [(arm.method, arm.made) for arm in arms] == [
        ("majority", "searched"), ("best_of_n", "rescored"), ("beam (rescored)", "rescored"),
    ]  # fmt: skip


def test_two_models_of_one_name_are_told_apart(run_of):
    runs = [run_of("cot", 1, [1, 0], 1), run_of("cot", 1, [0, 0], 1)]
    runs[1].description["policy"] = runs[1].description["policy"] | {"sha256": {"model.safetensors": "beef" * 16}}
    names = study(runs, {}).policies
    assert len(set(names)) == 2 and all(name.startswith("small (") for name in names) and "small (beef)" in names


def test_only_problems_that_all_runs_hold_are_compared_and_it_is_said(run_of):
    found = study([run_of("cot", 1, [1, 1, 0, 0], 1), run_of("majority", 4, [1, 0], 1)], {})
    assert found.ids == ("p000", "p001") and [arm.accuracy for arm in found.arms] == [1.0, 0.5]
    assert found.notes == ("2 problems are in all runs and compared; small-none-majority-4-0 holds 2, small-none-cot-1-0 4",)


def test_a_run_without_a_problem_is_left_out_and_it_is_said(run_of):
    found = study([run_of("cot", 1, [1], 1), run_of("majority", 4, [], 1, name="begun")], {})
    assert len(found.arms) == 1 and found.notes == ("begun holds no finished problem yet and is left out",)


def test_a_search_that_failed_counts_as_not_solved_and_is_told_of(run_of):
    run = run_of("cot", 1, [1, 1], 1000)
    run.records[1] |= {"error": "no room", "ledger": None, "correct": False, "answer": None}
    found = study([run], {})
    assert (found.arms[0].accuracy, found.arms[0].failed, found.arms[0].flops) == (0.5, 1, (1000.0, 0.0))
    assert found.notes == ("searches that failed and count as not solved, at no cost: 1",)
    assert [(one.id, one.errors) for one in found.problems] == [("p001", ("no room",))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: b.description["task"].update(name="other", problems_sha256="x"), "a is a run of sums, test and b of other"),
        (lambda a, b: b.description["task"].update(problems_sha256="x"), "and b of the same, but of other problems"),
        (lambda a, b: [record.update(id=f"q{i}") for i, record in enumerate(b.records)], "no problem is in all of the 2 runs"),
        (lambda a, b: b.description.update(a.description), r"a and b are both cot n=1 of small with seed 0: report one of them"),
        (lambda a, b: b.description.pop("policy"), "the run.json of b is not as a run of this version has it"),
        (lambda a, b: b.description.update(method=[]), "the run.json of b is not as"),
        (lambda a, b: b.description["policy"].update(parameters="many"), "the run.json of b is not as"),
        (lambda a, b: b.description.update(seed="0"), "the run.json of b is not as"),
        (lambda a, b: b.records[0].update(correct=None), "problem p000 of b has no known answer"),
        (lambda a, b: (a.records.clear(), b.records.clear()), "no run holds a finished problem yet"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_one_sentence(run_of, change, words):
    runs = run_of("cot", 1, [1, 0], 1, name="a"), run_of("majority", 4, [1, 0], 1, name="b")
    change(*runs)
    with pytest.raises(RunError, match=words):
        study(runs, {})


@pytest.mark.parametrize(
    ("levels", "bins"),
    [
        ((10, 2), ("2", "10")),
        (("hard", "easy"), ("easy", "hard")),
        ((1, None), ("1", "unknown")),
        ((1, [3]), ("1", "unknown")),
        ((None,), None),
        (tuple(range(9)), None),  # too many
    ],
)
def test_levels_are_bins_where_there_are_a_few(run_of, levels, bins):
    found = study([run_of("cot", 1, [1, 0] * 9, 1, levels=levels)], {})
    assert ([grouping.bins for grouping in found.groupings] or [None]) == [bins]
    assert bool(found.notes) == (len(levels) == 9)


def test_difficulty_is_a_policys_own(line_up):
    policy = line_up[0].description["policy"]["sha256"]
    easy = Difficulty(policy, ("easy", "medium", "hard"), {f"p{i:03}": "easy" if i < 10 else "hard" for i in range(99)})
    stranger = Difficulty({"model.safetensors": "x"}, easy.bins, easy.of)
    level, measured = study(line_up, {}, [easy, stranger]).groupings
    assert level.name == "level" and measured.of.keys() == {"small"}
    ids = [f"p{i:03}" for i in range(40)]
    counts = [len(measured.places("small", ids, bin)) for bin in measured.bins]
    assert counts == [10, 0, 30] and not measured.places("large", ids, "easy")
    assert len(study(line_up, {}, [stranger]).groupings) == 1


def test_problems_that_tell_runs_apart_come_with_what_was_answered(line_up):
    found = study(line_up, {"p015": "how much?"}, shown=2)
    assert [one.id for one in found.problems] == ["p020", "p021"]  # solved by half of the runs
    asked = study(line_up, {"p015": "how much?"}, shown=40).problems
    [one] = [one for one in asked if one.id == "p015"]
    assert (one.problem, one.gold, one.solved, one.answers) == ("how much?", "7", 5, (("7", True, 5), ("8", False, 1)))


def test_nothing_bounds_a_share_of_nothing():
    assert share_interval([], once=True) == share_interval([], once=False) == (0.0, 1.0)
