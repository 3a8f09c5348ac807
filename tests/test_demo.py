"""The main job: what it runs, what it claims, what it leaves behind."""

import json

import pytest

from tts_engine import cli, demo
from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.report.table import Cell
from tts_engine.runs import read_run
from tts_engine.testing import random_policy_directory, random_prm_directory

NUM_CELLS = 12


def cell(policy, method, n, solved, gflop, uses_prm=True, problems=100):
    ledger = Ledger(policy=PolicyLedger(linear_flops=int(gflop * 1e9 * problems)), prm=PRMLedger())
    return Cell(policy=policy, method=method, n=n, uses_prm=uses_prm, ids=tuple(map(str, range(problems))), ledger=ledger,
                correct=tuple(i < solved for i in range(problems)))  # fmt: skip


def cells(searched, large):
    return [
        cell("policy-s", "cot", 1, 20, 0.01, uses_prm=False),
        cell("policy-s", "majority", 16, 99, 0.1, uses_prm=False),
        cell("policy-s", "best_of_n", 16, searched, 0.3),
        cell("policy-s", "beam", 16, searched, 0.4),
        cell("policy-s", "dvts", 16, searched, 0.5),
        cell("policy-l", "cot", 1, large, 0.2, uses_prm=False),
        cell("policy-l", "majority", 4, 50, 0.8, uses_prm=False),
        cell("policy-l", "majority", 16, 55, 3.0, uses_prm=False),
    ]


def test_the_line_up_is_the_issues():
    names = [(policy, prm, [(m.name, m.n) for m in methods]) for policy, prm, methods in demo.LINE_UP]
    both = [(name, n) for name in ("majority", "best_of_n", "beam", "dvts") for n in (4, 16)]
    assert names == [
        ("policy-s", "prm-good", [("cot", 1), *both]),
        ("policy-l", None, [("cot", 1), ("majority", 4), ("majority", 16)]),
    ]


@pytest.mark.parametrize(
    ("beam", "large", "outcome", "claim"),
    [
        (70, 50, "beat", "The small policy with search beat the large one without: "),
        (40, 60, "lost", "The small policy with search did not beat the large one without: "),
        (51, 50, "cannot tell", "These problems cannot tell whether the small policy with search beats the large one without: "),
        (50, 50, "cannot tell", "These problems cannot tell"),
    ],
)
def test_the_verdict_claims_what_its_interval_allows(beam, large, outcome, claim):
    verdict = demo.verdict(cells(beam, large))
    assert verdict.outcome == outcome and verdict.sentence.startswith(claim)
    assert verdict.difference == pytest.approx((beam - large) / 100)
    low, high = verdict.interval
    assert low <= verdict.difference <= high
    assert verdict.sentence.count(". ") == 0 and "paired difference" in verdict.sentence


def test_the_verdict_is_of_the_search_chosen_beforehand_and_names_its_compute():
    method, n = demo.CHOSEN
    given = [c for c in cells(70, 50) if not c.uses_prm]
    given += [cell("policy-s", name, 16, 70 if (name, 16) == demo.CHOSEN else 90, 0.4) for name in ("best_of_n", "beam", "dvts")]
    verdict = demo.verdict(given)
    assert (verdict.small.method, verdict.large.method, verdict.large_majority.n) == (method, "cot", 16)
    assert f"policy-s with {method} n={n} solves 70.0 % at 0.40 GFLOP a problem in all (a search chosen" in verdict.sentence
    assert "policy-l with cot solves 50.0 % at 0.20 GFLOP" in verdict.sentence
    assert "+20.0 points" in verdict.sentence and "policy-l with majority n=16 solves 55.0 % at 3 GFLOP" in verdict.sentence


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Random models in place of the trained ones: what is shown here is the job, not the figures."""
    directory = tmp_path / "models"
    for name, seed in (("policy-s", 0), ("policy-l", 1)):
        random_policy_directory(directory / name, seed=seed, max_position_embeddings=96)
    random_prm_directory(directory / "prm-good", "qwen2.5-math-prm", max_position_embeddings=256)
    monkeypatch.setattr(demo, "model_path", lambda name: directory / name)
    return directory


def test_the_demo_leaves_runs_a_table_a_plot_and_a_verdict(models, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["demo", "--problems", "3", "--out", str(out), "--json"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    summary = json.loads(shown.splitlines()[-1])
    assert summary["problems"] == 3 and len(summary["cells"]) == NUM_CELLS and summary["verdict"]["sentence"]
    assert (out / "accuracy.png").read_bytes()[1:4] == b"PNG" and str(out) in shown
    runs = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(runs) == NUM_CELLS and all(len(list(read_run(path))) == 3 for path in runs)
    assert all(word in shown for word in ("accuracy", "re-read", "correct", "policy-l", "dvts"))
    searched = [c["ledger"]["prm"] for c in summary["cells"] if c["method"] in ("best_of_n", "beam", "dvts")]
    assert all(0 < prm["tokens_computed"] < prm["tokens_reread"] for prm in searched)

    before = {path: (path / "problems.jsonl").read_bytes() for path in runs}
    assert cli.main(argv) == 0  # continued, it finds everything done
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == summary and before == {path: (path / "problems.jsonl").read_bytes() for path in runs}


def test_more_problems_than_there_are_is_one_sentence(models, tmp_path, capsys):
    assert cli.main(["demo", "--problems", "601", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: the embedded task's test split has 600 problems, not 601\n"
