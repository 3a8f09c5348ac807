"""Runs, sweeps, pilots and diagnostics on the disk, gathered; and the verb that reports them."""

import json

import pytest

from tts_engine import cli
from tts_engine.errors import RunError
from tts_engine.gather import diagnosed, gather, unfolded
from tts_engine.report.comparison import accuracy_rows, ledger_rows
from tts_engine.score import score
from tts_engine.strategy import StrategyError
from tts_engine.tasks.grader import Grader
from tts_engine.testing import random_policy_directory, random_prm_directory

PROBLEMS = [{"problem": f"a={i}+3;a?", "answer": str(i + 3), "level": i % 2} for i in range(3)]
RUNS = {
    "cot": ["--method", "cot"],
    "majority": ["--method", "majority", "--n", "2"],
    "best": ["--method", "best_of_n", "--n", "2"],
    "pilot": ["--method", "majority", "--n", "2", "--seed", "1"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real runs of random models: what they solve is nothing, what they cost and hold is as it is."""
    directory = tmp_path_factory.mktemp("made")
    random_policy_directory(directory / "policy")
    random_prm_directory(directory / "prm", "math-shepherd")
    task = directory / "sums.jsonl"
    task.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    small = ["--max-step-tokens", "6", "--max-steps", "2", "--block-size", "8", "--kv-bytes", "4M", "--system", ""]
    models = ["--policy", str(directory / "policy"), "--prm", str(directory / "prm")]
    for name, method in RUNS.items():
        assert cli.main(["eval", "--task", str(task), *models, *small, *method, "--out", str(directory / name)]) == 0
    return directory


def test_a_report_counts_what_score_counts_and_costs_what_records_say(made):
    study = gather([made / "cot", made / "majority", made / "best"])
    assert [(arm.method, arm.prm) for arm in study.arms] == [("cot", None), ("majority", None), ("best_of_n", "prm")]
    with Grader() as grader:
        for arm, row, spent, name in zip(study.arms, accuracy_rows(study), ledger_rows(study), RUNS, strict=False):
            records = score(made / name, grader).records
            assert row.share.accuracy == sum(record["correct"] for record in records) / 3
            flops = [record["ledger"]["policy"]["ideal_flops"] + record["ledger"]["prm"]["ideal_flops"] for record in records]
            assert sorted(arm.flops) == sorted(flops) and row.share.gflop == pytest.approx(sum(flops) / 3e9)
            executed = [record["ledger"]["policy"]["flops"] + record["ledger"]["prm"]["flops"] for record in records]
            assert spent.executed_gflop == pytest.approx(sum(executed) / 3e9)
    assert study.groupings[0].bins == ("0", "1") and len(study.ids) == 3


def test_a_sweep_stands_for_its_runs_each_counted_once(made, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("cot", "best", "pilot"):
        (tmp_path / "runs" / name).symlink_to(made / name)
    cells = [{"directory": f"runs/{name}", "pilot": name == "pilot"} for name in ("cot", "best", "not begun", "pilot")]
    (tmp_path / "sweep.json").write_text(json.dumps({"schema_version": 1, "cells": cells}))
    assert [path.name for path in unfolded([tmp_path, made / "best", made / "majority"])] == ["cot", "best", "majority"]
    study = gather([tmp_path, made / "majority"])
    assert len(study.arms) == 3 and [grouping.name for grouping in study.groupings] == ["level", "pass@1"]


def test_how_hard_problems_are_is_told_by_other_draws(made):
    study = gather([made / "majority"], [made / "pilot"])
    assert study.groupings[-1].bins == ("easy", "medium", "hard")
    assert sum(len(study.groupings[-1].places("policy", study.ids, bin)) for bin in study.groupings[-1].bins) == 3
    with pytest.raises(StrategyError, match="share their draws"):
        gather([made / "best"], [made / "majority"])
    with pytest.raises(StrategyError, match="only independent draws tell"):
        gather([made / "best"], [made / "cot"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json cannot be read: No such file"),
        (lambda run: (run / "run.json").write_text("[]"), "is no description of a run"),
        (lambda run: (run / "run.json").write_text('{"schema_version": 1}'), "is not as a run of this version has it"),
        (lambda run: (run / "run.json").write_text('{"schema_version": 9}'), "was written with schema_version 9"),
        (lambda run: (run / "problems.jsonl").write_text('{"id": "a"}\n'), "problems.jsonl line 1 is no record of a search"),
        (lambda run: (run / "problems.jsonl").write_text(""), "no run holds a finished problem yet"),
        (lambda run: (run / "sweep.json").write_text("{}"), "sweep.json"),
        (lambda run: (run / "diagnostics.json").write_text("{}"), "diagnostics.json lacks schema_version"),
    ],
)
def test_damaged_directories_are_one_sentence(made, tmp_path, damage, words):
    for name in ("run.json", "problems.jsonl"):
        (tmp_path / name).write_bytes((made / "cot" / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(RunError, match=words):
        gather([tmp_path])
        diagnosed([tmp_path])


def test_the_verb_leaves_a_page_and_pngs_and_prints_the_tables(made, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tts_engine.report.curves.DPI", 30)
    diagnosis = tmp_path / "diagnosis.json"
    assert cli.main(["diagnose", str(made / "best"), "-o", str(diagnosis)]) == 0
    runs = [str(made / name) for name in ("cot", "majority", "best")]
    capsys.readouterr()
    beside = ["--difficulty", str(made / "pilot"), "--diagnostics", str(diagnosis)]
    argv = ["report", *runs, *beside, "-o", str(tmp_path / "out"), "--json"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    told = json.loads(shown.splitlines()[-1])
    assert (told["problems"], len(told["accuracy"]), told["out"]) == (3, 3, str(tmp_path / "out"))
    titles = ("Accuracy and compute over 3 problems", "Accuracy by level", "Accuracy by pass@1", "Gain over", "The best", "Where")
    assert all(title in shown for title in titles) and "steps by length" in shown
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "steps by length" in page and 'href="#diagnostics"' in page and page.count("data:image/png;base64,") == 5
    names = {"accuracy-n.png", "accuracy-flops.png", "level-1.png", "pass-rate-1.png", "diagnostics-1.png", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_runs_of_different_problems_are_refused_with_exit_code_2(made, tmp_path, capsys):
    for name in ("run.json", "problems.jsonl"):
        (tmp_path / name).write_bytes((made / "cot" / name).read_bytes())
    description = json.loads((tmp_path / "run.json").read_text())
    description["task"]["name"] = "other"
    (tmp_path / "run.json").write_text(json.dumps(description))
    assert cli.main(["report", str(made / "best"), str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "only runs of the same problems can be compared" in capsys.readouterr().err and not (tmp_path / "out").exists()
