"""`tts-engine sweep` as its users meet it."""

import json

import pytest

from tts_engine.runs import read_run
from tts_engine.sweep import read_sweep

SMALL = {"max_step_tokens": 12, "block_size": 8, "kv_bytes": "4M", "system": ""}


@pytest.fixture
def recipe(models, tmp_path):
    """settings -> the file of a recipe with them."""

    def write(**changed):
        methods = [{"name": "cot", "max_steps": 4}, {"name": "best_of_n", "n": [1, 2], "max_steps": 4}]
        data = {"task": "embedded", "split": "calibration", "limit": 2, "policies": [str(models / "policy")]}
        file = tmp_path / "small.yaml"  # JSON is YAML
        file.write_text(json.dumps(data | {"prms": [str(models / "prm")], "methods": methods, "engine": SMALL} | changed))
        return file

    return write


def test_a_sweep_is_made_once_and_told_again(recipe, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("sweep", recipe(), "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["out"] == "runs/small" and told["failed"] == 0 and "2 problems" in out
    assert [(cell["method"], cell["n"], cell["made"]) for cell in told["cells"]] == [
        ("cot", 1, "searched"), ("best_of_n", 1, "replayed"), ("best_of_n", 2, "searched")]  # fmt: skip
    assert all(cell["problems"] == 2 and cell["asked_flops"] > 0 for cell in told["cells"])
    assert [len(list(read_run(directory))) for directory in read_sweep(tmp_path / "runs" / "small")] == [2, 2, 2]
    code, out, _ = run("sweep", recipe(), "--json")
    assert code == 0 and json.loads(out.splitlines()[-1]) == told


def test_what_is_wrong_is_one_sentence_and_exit_code_2(recipe, run, tmp_path):
    for changed, words in [
        ({"methods": []}, "small.yaml: methods is empty"),
        ({"task": "nothing"}, "nothing is no task and no file"),
        ({"policies": ["no/such/place"]}, "no/such/place"),
        ({"engine": {"device": "cuda:99"}}, "finds"),
        ({"engine": {"device": "tpu"}}, "tpu"),
    ]:
        code, out, error = run("sweep", recipe(**changed), "-o", tmp_path / "out")
        assert code == 2 and out == "" and words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert run("sweep", tmp_path / "none.yaml")[0] == run("sweep")[0] == 2
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_a_sweep_that_goes_on(recipe, run, tmp_path, monkeypatch):
    from tts_engine.report.progress import Progress

    advance = Progress.advance

    def interrupted(self, record):
        advance(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", interrupted)
    code, _, error = run("sweep", recipe(), "-o", tmp_path / "out")
    assert code == 130 and "safe in" in error and "run the same command again to continue" in error
    monkeypatch.setattr(Progress, "advance", advance)
    assert run("sweep", recipe(), "-o", tmp_path / "out")[0] == 0


def test_a_problem_that_failed_is_told_by_the_exit_code(recipe, run, tmp_path):
    task = tmp_path / "long.jsonl"
    task.write_text("".join(json.dumps({"problem": problem, "answer": "1"}) + "\n" for problem in ("1+" * 600 + "1", "a=1+1;a?")))
    code, _, error = run("sweep", recipe(task=str(task), split="test"), "-o", tmp_path / "out")
    assert code == 1 and "3 times a problem could not be searched" in error


def test_a_dry_run_tells_costs_and_makes_nothing(recipe, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run("sweep", recipe(), "--dry-run", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and error == "" and told["missing"] == [] and "estimated, not measured" in out
    assert [(cell["method"], cell["n"], cell["hours"] > 0) for cell in told["cells"]] == [
        ("cot", 1, True), ("best_of_n", 2, True), ("best_of_n", 1, False)]  # fmt: skip
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, error = run("sweep", recipe(policies=["no-such/policy"]), "--dry-run", "--configs", tmp_path)
    assert code == 1 and "0 cells" in out and error.startswith("no-such/policy is no local directory") and error.count("\n") == 1
    code, _, error = run("sweep", recipe(), "--configs", tmp_path)
    assert code == 2 and "--configs is for --dry-run" in error
