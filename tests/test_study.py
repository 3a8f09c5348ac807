"""What the study's claims make of runs in which the truth is known."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tts_engine.ledger import Ledger
from tts_engine.report.arms import Difficulty, RunRead, study

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the folder of benches, which no installation has

from bench.study import claims as study_claims  # noqa: E402
from bench.study import study as study_run  # noqa: E402
from bench.study.claims import GOOD, LARGE, METHODS, MIDDLE, POOR, REDO, SIZES, SMALL, TINY, Side  # noqa: E402
from bench.study.study import QUICK, Scale, jobs, strategy_jobs  # noqa: E402
from bench.study.telling import claim_table, cost_table, main_grid, summary  # noqa: E402

CHECKPOINTS = study_claims.CHECKPOINTS
PROBLEMS = 90
BINS = ("easy", "medium", "hard")
PARAMETERS = {SMALL: 100, MIDDLE: 400, LARGE: 2000, REDO: 400, GOOD: 600, POOR: 600, TINY: 150} | dict.fromkeys(CHECKPOINTS, 600)
BUDGETS = {SMALL: (4, 16, 64), MIDDLE: (4, 16, 64), LARGE: (4, 16)}
QUALITY = dict(zip(CHECKPOINTS, (0.5, 0.6, 0.7, 0.8, 0.9), strict=True))


GAINS = {  # of a search with the good PRM over a majority, by bin
    SMALL: {"best_of_n": (0.3, 0.1, 0.1), "beam": (0.2, 0.2, 0.3), "dvts": (0.1, 0.3, 0.1)},
    MIDDLE: {"best_of_n": (0.2, 0.0, 0.0), "beam": (0.0, 0.0, 0.2), "dvts": (0.1, 0.2, 0.1)},
    LARGE: {"best_of_n": (0.1, 0.0, -0.1), "beam": (-0.1, -0.1, 0.1), "dvts": (0.0, 0.1, 0.0)},
}


def paper(policy, prm, method, n, bin):
    """The chance to solve a problem in a world in which every claim holds."""
    base = {SMALL: 0.3, MIDDLE: 0.4, LARGE: 0.5, REDO: 0.2}[policy] + {"easy": 0.2, "medium": 0.0, "hard": -0.2}[bin]
    more = sum(n > least for least in (1, 4, 16)) / 30
    if method in ("cot", "adaptive"):
        return base
    if method == "majority":
        return base + more
    if prm == POOR:
        return base + more if method == "auto" else base - 0.1
    if prm in CHECKPOINTS[:-1]:
        return base - 0.1 + CHECKPOINTS.index(prm) / 30
    if prm == TINY:
        return base + 0.2
    return base + more + (0.35 if method == "auto" else GAINS[policy][method][BINS.index(bin)])


def alike(policy, prm, method, n, bin):
    return 0.4


def reversed_paper(policy, prm, method, n, bin):
    """Search costs the small policy much and the large one little, the PRM that was called poor is of use, and so on."""
    if policy == REDO:
        return 0.7
    if method == "auto":
        return 0.1
    if prm == POOR and method != "majority":
        return 0.6
    if method in ("cot", "majority", "adaptive"):
        return 0.5
    if prm in CHECKPOINTS[:-1]:
        return 0.4 - 0.05 * CHECKPOINTS.index(prm)
    return {SMALL: 0.1, MIDDLE: 0.15, LARGE: 0.2}[policy]


def arms_of(split):
    for policy in SIZES:
        yield policy, None, "cot", 1
        for n in (1, *BUDGETS[policy]):
            yield policy, None, "majority", n
        for prm in (GOOD, POOR):
            for n in BUDGETS[policy]:
                yield from ((policy, prm, method, n) for method in METHODS[1:])
            if split == "test":
                yield from ((policy, prm, "auto", n) for n in (1, *BUDGETS[policy]))
        if split == "test":
            yield from ((policy, prm, "best_of_n", 16) for prm in (TINY, *CHECKPOINTS[:-1]))
            yield policy, None, "adaptive", BUDGETS[policy][-1]
    yield REDO, None, "cot", 1


def cost(policy, prm, method, n):
    """FLOPs of a problem, those of a PRM in all searches."""
    ledger = Ledger.empty()
    ledger.policy.linear_flops = PARAMETERS[policy] * (5 if policy == REDO else n)
    if prm is not None:
        ledger.prm.linear_flops = PARAMETERS[prm] * n
    return ledger.as_dict()


def side(split, chance):
    """Runs of a split. Each problem is solved wherever the chance is above its own number; those of a bin are spread evenly."""
    luck = [(i // 3 + 0.5) / (PROBLEMS / 3) for i in range(PROBLEMS)]
    ids = [f"{split}-{i:03}" for i in range(PROBLEMS)]
    bins = [BINS[i % 3] for i in range(PROBLEMS)]
    runs = []
    for policy, prm, method, n in arms_of(split):
        told = {name: {"name": name, "parameters": PARAMETERS[name], "sha256": {"weights": name}} for name in (policy, prm) if name}
        description = {
            "task": {"name": "embedded", "split": split, "problems_sha256": split}, "engine": {}, "seed": 0,
            "method": {"name": method, "n": n}, "policy": told[policy], "prm": told.get(prm),
        }  # fmt: skip
        spent = cost(policy, prm, method, n)
        records = [
            {"id": id, "level": 1, "gold": "1", "answer": "1", "error": None, "seconds": 0.0, "ledger": spent,
             "method": {"name": method, "n": n}, "aggregates": {}, "correct": luck[i] < chance(policy, prm, method, n, bins[i])}
            for i, id in enumerate(ids)
        ]  # fmt: skip
        runs.append(RunRead(f"{policy}-{prm}-{method}-{n}", description, records))
    difficulty = [Difficulty({"weights": policy}, BINS, dict(zip(ids, bins, strict=True))) for policy in SIZES]
    votes = {(policy, prm): {"majority": [x < 0.4 for x in luck], "last_vote": [x < (0.5 if prm == GOOD else 0.3) for x in luck]}
             for policy in SIZES for prm in (GOOD, POOR)}  # fmt: skip
    return Side(study(runs, {}, difficulty), PARAMETERS, votes)


@pytest.fixture(scope="module")
def worlds():
    return {chance: (side("calibration", chance), side("test", chance)) for chance in (paper, alike, reversed_paper)}


def test_every_claim_holds_where_it_is_true(worlds):
    claims = study_claims.make_claims(*worlds[paper], QUALITY)
    found = {name: verdict.outcome for name, verdict in study_claims.judge(claims).items()}
    assert found == dict.fromkeys(["a1", "a2", "b", "c", "d", "e", "f", "g", "h1", "h2"], "holds")


def test_no_claim_holds_where_all_are_alike(worlds):
    votes = {"majority": [True] * PROBLEMS}
    sides = [replace(one, votes=dict.fromkeys(one.votes, votes)) for one in worlds[alike]]
    found = study_claims.judge(study_claims.make_claims(*sides, QUALITY))
    assert {verdict.outcome for verdict in found.values()} == {"cannot tell"}


def test_a_claim_that_is_the_other_way_round_does_not_hold(worlds):
    claims = study_claims.make_claims(*worlds[reversed_paper], QUALITY)
    outcomes = {name: verdict.outcome for name, verdict in study_claims.judge(claims).items()}
    assert {name for name, outcome in outcomes.items() if outcome == "does not hold"} == {"a2", "b", "d", "e", "g", "h1", "h2"}


def test_claims_tell_what_was_chosen_and_by_how_much(worlds):
    claims = {claim.name: claim for claim in study_claims.make_claims(*worlds[paper], QUALITY)}
    assert claims["a1"].told["chosen"] == {SMALL: "beam", MIDDLE: "dvts", LARGE: "dvts"}
    winners = claims["c"].told["chosen"][LARGE]
    assert {bin: winners[bin] for bin in BINS} == {"easy": "best_of_n", "medium": "dvts", "hard": "beam"}
    assert claims["g"].told["chosen"] == dict.fromkeys(BINS, "majority n=4")
    assert np.mean(claims["a2"].values) == pytest.approx(0.2, abs=0.02)
    assert claims["h1"].told["pairs"][f"{TINY} on {LARGE}"]["PRM / policy"] == 0.075
    rate = np.mean(claims["h2"].values)
    assert rate == pytest.approx(np.polyfit(np.array([0.5, 0.6, 0.7, 0.8, 0.9]) * 10, list(
        point["all"] for point in claims["h2"].told["checkpoints"].values()), 1)[0])  # fmt: skip


def test_compute_is_told_for_the_accuracy_of_the_largest_majority(worlds):
    claims = {claim.name: claim for claim in study_claims.make_claims(*worlds[paper], QUALITY)}
    factor = claims["d"].told["less compute for the accuracy of the largest majority"][f"{SMALL}, {GOOD}"]
    assert factor["reached"] and factor["factor"] > 1 and factor["outcome"] == "less"


def test_training_is_counted_with_the_policy_that_a_prm_began_as():
    found = study_claims.training_flops(PARAMETERS)
    assert found[SMALL] == 6 * 100 * 14e6 and found[LARGE] == 6 * 2000 * 13e6 and found[REDO] == found[MIDDLE]
    assert found[GOOD] == found[MIDDLE] + 6 * 600 * 12e6 and found[TINY] == found[SMALL] + 6 * 150 * 8e6


def test_stopping_is_held_against_the_whole_majority(worlds):
    [found, *_] = study_claims.adaptive_stopping(worlds[paper][1]).values()
    assert found["difference"] < 0 and found["share of FLOPs"] == 1.0


def test_what_is_told_is_plain_and_whole(worlds):
    calibration, test = worlds[paper]
    claims = study_claims.make_claims(calibration, test, QUALITY)
    verdicts, training = study_claims.judge(claims), study_claims.training_flops(test.parameters)
    strategy = {"name": "study", "tables": [{"policy": {"name": SMALL}, "prm": {"name": GOOD}, "picks": [], "predictor": None}]}
    found = summary(claims, verdicts, test, training, QUALITY, strategy)
    assert found["problems"] == PROBLEMS and len(found["claims"]) == 10 and len(found["arms"]) == len(test.study.arms)
    small, large = found["with training"][1:]
    assert small["training"] == training[SMALL] + training[GOOD] and large["total"] == training[LARGE] + 2000 * PROBLEMS
    assert claim_table(claims, verdicts).count("\n") == 12
    assert f"| {LARGE}, cot |" in cost_table(test, training)
    assert {arm.prm for arm in main_grid(test.study).arms} == {None, GOOD, POOR}


def test_the_study_makes_all_that_its_claims_take():
    made = {(split, policy.rpartition("/")[2], prm.rpartition("/")[2] if prm else None, method["name"], n)
            for job in [*jobs(Scale()), *strategy_jobs(Scale(), Path("strategy.json"))] if job.recipe["seed"] == 0
            for split in [job.recipe["split"]] for policy in job.recipe["policies"] for prm in [*job.recipe["prms"], None]
            for method in job.recipe["methods"] for n in method.get("n", [1])}  # fmt: skip
    for split in ("calibration", "test"):
        assert {(split, *arm) for arm in arms_of(split)} <= made
    assert {job.recipe["limit"] for job in jobs(QUICK)} == {24}


def test_without_its_models_the_study_says_how_to_make_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study_run, "MODELS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "-o", str(tmp_path / "out")])
    assert study_run.main() == 2
    assert f"lacks {REDO}, {TINY}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_its_models_are_whole_and_small():
    names = (REDO, TINY, *CHECKPOINTS[:-1])
    files = [path for name in names for path in (study_run.MODELS / name).iterdir()]
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert all((study_run.MODELS / name / file).is_file() for name in names)
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.name for path in study_run.MODELS.iterdir() if path.is_dir()} == set(names)
