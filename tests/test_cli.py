"""The command line as its users meet it: verbs, refusals of one sentence, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from tts_engine import embedded, options
from tts_engine.testing import random_prm_directory

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = "a=47+38;b=a-6;b?"


@pytest.fixture
def given(models):
    """Options that name the models and keep searches small."""
    small = ["--max-step-tokens", "12", "--max-steps", "4", "--block-size", "8", "--kv-bytes", "4M", "--system", ""]
    return ["--policy", str(models / "policy"), "--prm", str(models / "prm"), *small]


def shell(*argv, **how):
    return subprocess.Popen([sys.executable, "-m", "tts_engine", *map(str, argv)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "arguments are required: VERB"),
        (["solv"], "invalid choice: 'solv'"),
        (["solve"], "arguments are required: PROBLEM"),
        (["solve", PROBLEM, "--n", "x"], "'x' is not a whole number"),
        (["solve", PROBLEM, "--n", "0"], "n must be a whole number of at least 1, not 0"),
        (["solve", PROBLEM, "--n", "6"], "n=6 must be a multiple of width=4"),
        (["solve", PROBLEM, "--nn", "6"], "unrecognized arguments: --nn"),
        (["solve", PROBLEM, "--metho", "cot"], "unrecognized arguments: --metho"),
        (["solve", PROBLEM, "--method", "mcts"], "invalid choice: 'mcts' (choose from"),
        (["solve", PROBLEM, "--method", "cot", "--n", "4"], "cot has no setting 'n'"),
        (["solve", PROBLEM, "--method", "majority", "--width", "4"], "majority has no setting 'width'"),
        (["solve", PROBLEM, "--method", "auto"], "auto needs --strategy: a file that fit wrote, or paper_table"),
        (["solve", PROBLEM, "--method", "auto", "--strategy", "paper_table", "--width", "4"], "auto has no setting 'width'"),
        (["solve", PROBLEM, "--method", "cot", "--strategy", "paper_table"], "--strategy is for --method auto"),
        (["solve", PROBLEM, "--difficulty", "x"], "unrecognized arguments: --difficulty x"),
        (["eval", "--task", "embedded", "--difficulty", "x", "--out", "OUT"], "--difficulty is for --method auto"),
        (["fit", "no/such/run", "--pilot", "no/such/pilot", "--out", "OUT"], "no/such/run/run.json cannot be read: No such file"),
        (["fit", "no/such/run", "--out", "OUT"], "arguments are required: --pilot"),
        (["fit", "no/such/run", "--pilot", "x", "--out", "OUT", "--edges", "0.5,2"], "'2' is not a number above 0 and at most 1"),
        (["solve", PROBLEM, "--rules", "mine"], "invalid choice: 'mine'"),
        (["solve", PROBLEM, "--temperature", "-1"], "temperature must be a number of at least 0"),
        (["solve", PROBLEM, "--temperature", "nan"], "'nan' is not a number"),
        (["solve", PROBLEM, "--top-p", "1.5"], "'1.5' is not a number above 0 and at most 1"),
        (["solve", PROBLEM, "--min-p", "-0.1"], "'-0.1' is not a number of at least 0 and at most 1"),
        (["solve", PROBLEM, "--min-p", "nan"], "'nan' is not a number of at least 0 and at most 1"),
        (["solve", PROBLEM, "--top-k", "-2"], "'-2' is not a whole number of at least 0"),
        (["solve", PROBLEM, "--kv-bytes", "4T"], "'4T' is not a number of bytes such as 512M or 4G"),
        (["solve", PROBLEM, "--kv-bytes", "100"], "kv_bytes=100 holds no block"),
        (["solve", PROBLEM, "--max-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["solve", PROBLEM, "--dtype", "int3"], "no dtype 'int3'; known: float32, bfloat16"),
        (["solve", PROBLEM, "--device", "tpu"], "no device 'tpu'; known: cpu, cuda"),
        (["solve", PROBLEM, "--device", "cuda:99"], "finds"),
        (["solve", PROBLEM, "--backend", "quick"], "quick"),
        (["solve", PROBLEM, "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["solve", PROBLEM, "--policy", "no/such/place"], "no/such/place"),
        (["solve", PROBLEM, "--prm", "no/such/place"], "no/such/place"),
        (["solve", PROBLEM, "--prm-family", "odd"], "odd"),
        (["solve", "  "], "is empty"),
        (["solve", "\udcff"], "not UTF-8"),
        (["solve", PROBLEM, "--method", "majority", "--budget", "60s"], "majority has no setting 'budget'; known: n, rules,"),
        (["solve", PROBLEM, "--method", "adaptive", "--budget", "60m"], "such as 50000tokens, 2e9flops or 60s, not '60m'"),
        (["solve", PROBLEM, "--method", "adaptive", "--bound", "1"], "bound must be a number of at least 0 and below 1"),
        (["eval", "--task", "embedded"], "arguments are required: --out"),
        (["eval", "--task", "nothing", "--out", "OUT"], "nothing is no task and no file; known: embedded"),
        (["eval", "--task", "embedded", "--split", "exam", "--out", "OUT"], "no split 'exam'"),
        (["eval", "--task", "embedded", "--limit", "0", "--out", "OUT"], "'0' is not a whole number of at least 1"),
        (["eval", "--task", "embedded", "--out", "/dev/null/run"], "/dev/null/run cannot be used"),
        (["score"], "arguments are required: DIR"),
        (["score", "no/such/run"], "no/such/run/run.json cannot be read: No such file"),
        (["score", "no/such/run", "--grouping", "loose"], "invalid choice: 'loose' (choose from"),
        (["rescore", "no/such/run"], "arguments are required: --prm"),
        (["rescore", "no/such/run", "--prm", "prm-good"], "no/such/run/run.json cannot be read: No such file"),
        (["rescore", "no/such/run", "--prm", "prm-good", "--n", "4"], "unrecognized arguments: --n 4"),
        (["diagnose"], "arguments are required: RUN|FILE"),
        (["diagnose", "no/such/run"], "no/such/run/run.json cannot be read: No such file"),
        (["diagnose", "no/such/run", "--prm", "prm-good"], "no/such/run cannot be read: No such file"),
        (["diagnose", __file__], "is no run and holds no scores: give --prm"),
        (["diagnose", __file__, "--prm", "prm-good"], "line 1 is not JSON"),
        (["diagnose", __file__, "--kv-bytes", "1M"], "--kv-bytes is for a PRM that reads now: give --prm"),
        (["diagnose", "no/such/run", "--threshold", "1.5"], "'1.5' is not a number of at least 0 and at most 1"),
        (["diagnose", "no/such/run", "--out", "/dev"], "--out /dev is a directory, not a file"),
        (["report"], "arguments are required: RUN"),
        (["report", "no/such/run"], "no/such/run/run.json cannot be read: No such file"),
        (["convert", "no/such/place"], "arguments are required: DST"),
        (["convert", "no/such/place", "OUT"], "no/such/place is not a directory"),
        (["convert", "/dev/null", "OUT"], "/dev/null is not a directory"),
        (["info", "--policy", "/dev/null/x"], "/dev/null/x"),
        (["demo", "--problems", "0"], "'0' is not a whole number of at least 1"),
        (["demo", "--seed", "1"], "unrecognized arguments: --seed"),
        (["embedded"], "arguments are required: VERB"),
        (["embedded", "check", "--problems", "none"], "'none' is not a whole number"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_2(run, given, tmp_path, argv, words):
    argv = [str(tmp_path / "run") if argument == "OUT" else argument for argument in argv]
    own = given if argv[:1] in (["solve"], ["eval"]) and len(argv) > 1 else []
    code, out, err = run(*argv[:1], *own, *argv[1:])
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_search_with_a_foreign_policy_needs_a_prm_to_be_named(run, models):
    code, _, err = run("solve", PROBLEM, "--policy", models / "policy")
    assert (code, err) == (2, "error: beam needs a PRM: give --prm\n")


def test_a_damaged_line_of_a_task_is_named_before_any_work(run, given, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?"}\n')
    code, _, err = run("eval", *given, "--task", task, "--out", tmp_path / "run")
    assert code == 2 and "line 2: no field 'answer'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_problem_too_long_for_the_model_is_one_sentence(run, given):
    code, _, err = run("solve", *given, "1+" * 400 + "1?")
    assert code == 2 and "tokens" in err and err.count("\n") == 1


# --- help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "solve",
        "eval",
        "fit",
        "score",
        "rescore",
        "diagnose",
        "convert",
        "info",
        "bench",
        "demo",
        "embedded",
        "embedded train",
        "embedded check",
    ],
)
def test_every_verb_explains_itself(run, verb):
    code, out, err = run(*verb.split(), "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: tts-engine {verb}")


def test_help_brings_neither_torch_nor_numpy_nor_rich():
    command = (
        "import sys; from tts_engine import cli; cli.make_parser(cli.RUNS); print(*{'torch', 'numpy', 'rich'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "\n"


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("tts-engine ")


def test_engine_options_are_the_settings_of_an_engine_and_state_their_defaults():
    from tts_engine.config import EngineConfig

    defaults = {field.name: field.default for field in fields(EngineConfig)}
    assert [name for name, *_ in options.ENGINE_OPTIONS] == list(defaults)
    for name, read, text in options.ENGINE_OPTIONS:
        stated = re.search(r"\(default ([^ ;)]+)", text)
        if stated and read and defaults[name] is not None:
            assert read(stated[1]) == defaults[name], name
        else:
            assert defaults[name] in (None, False), name


def test_what_can_be_named_is_named_in_the_help():
    from tts_engine.attention import BACKENDS
    from tts_engine.config import DTYPES
    from tts_engine.prm.families import FAMILIES
    from tts_engine.steps import STEP_MARKERS

    told = {name: text for name, _, text in options.ENGINE_OPTIONS}
    for option, names in {"backend": BACKENDS, "dtype": DTYPES, "prm_family": FAMILIES, "steps": STEP_MARKERS}.items():
        assert all(name in told[option] for name in names), option


# --- solve ----------------------------------------------------------------------------------------------------------------


def test_solve_shows_steps_answer_and_cost(run, given):
    code, out, err = run("solve", PROBLEM, *given, "--n", "4", "--tree", "--json")
    assert (code, err) == (0, "")
    *shown, last = out.splitlines()
    record = json.loads(last)
    assert shown[0] == PROBLEM and len([line for line in shown if "── " in line]) == len(record["nodes"])
    assert any(line.startswith("answer: ") for line in shown)
    assert any("tokens generated" in line for line in shown) and any("by re-reading" in line for line in shown)
    assert record["problem"] == PROBLEM and record["gold"] is None and record["correct"] is None
    assert len(record["aggregates"]) == 7 and record["method"]["n"] == 4


def test_solve_without_a_prm_where_the_method_reads_none(run, given):
    code, out, _ = run("solve", PROBLEM, *given, "--method", "cot", "--prm", "no/such/place", "--json")
    assert code == 0 and list(json.loads(out.splitlines()[-1])["aggregates"]) == ["majority"]


def test_solve_is_the_same_for_the_same_seed(run, given):
    def nodes(seed):
        record = json.loads(run("solve", PROBLEM, *given, "--n", "4", "--seed", seed, "--json")[1].splitlines()[-1])
        return [node["tokens"] for node in record["nodes"]]

    assert nodes(1) == nodes(1) != nodes(2)


@pytest.mark.skipif(not (embedded.MODELS / "policy-s").is_dir(), reason="needs the embedded models: tts-engine embedded train")
def test_solve_with_the_models_that_ship(run):
    code, out, _ = run("solve", "a=7+5;b=a-4;b?", "--json")
    record = json.loads(out.splitlines()[-1])
    assert code == 0 and record["method"]["name"] == "beam" and record["method"]["n"] == 16
    asked = ["--policy", "policy-l", "--method", "majority", "--n", "8", "--json"]
    code, out, _ = run("solve", "a=47+38;b=6*9;c=a-b;d=c*7;d?", *asked)
    assert code == 0 and json.loads(out.splitlines()[-1])["answer"] == "217"


# --- eval -----------------------------------------------------------------------------------------------------------------


def test_eval_reports_continues_and_refuses(run, given, tmp_path):
    out = tmp_path / "run"
    argv = ["eval", *given, "--task", "embedded", "--split", "calibration", "--limit", 5, "--out", out, "--n", 4, "--json"]
    code, shown, _ = run(*argv)
    summary = json.loads(shown.splitlines()[-1])
    assert code == 0 and summary["problems"] == 5 and summary["method"] == "beam" and summary["failed"] == 0
    assert "accuracy" in shown and "last_vote" in shown and str(out) in shown
    journal = (out / "problems.jsonl").read_bytes()
    (out / "problems.jsonl").write_bytes(journal[:-100])  # as a kill leaves it
    assert run(*argv)[0] == 0
    ids = [json.loads(line)["id"] for line in (out / "problems.jsonl").read_bytes().splitlines()]
    assert len(ids) == len(set(ids)) == 5
    code, shown, err = run(*argv, "--n", 8)
    assert (code, shown) == (2, "") and "was made with n=4, not n=8" in err and err.count("\n") == 1


def test_eval_counts_a_problem_that_cannot_be_searched_and_exits_1(run, given, tmp_path):
    task = tmp_path / "task.jsonl"
    long = "1+" * 400 + "1?"
    task.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in ("a=1+1;a?", long)))
    code, shown, err = run("eval", *given, "--task", task, "--method", "majority", "--n", 2, "--out", tmp_path / "run", "--json")
    assert code == 1 and "1 problems could not be searched" in err and "task-2" in err
    assert json.loads(shown.splitlines()[-1])["failed"] == 1


def test_ctrl_c_leaves_a_whole_journal_and_says_how_to_go_on(given, tmp_path):
    out = tmp_path / "run"
    slow = ["--method", "majority", "--n", "256", "--max-rows", "64"]  # all 600 problems take far longer than the first
    # Whoever runs the tests in a shell's background has its interrupts ignored, and children would inherit that.
    child = shell("eval", *given, *slow, "--task", "embedded", "--split", "calibration", "--out", out,
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    while child.poll() is None and (not (out / "problems.jsonl").exists() or not (out / "problems.jsonl").stat().st_size):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err
    lines = (out / "problems.jsonl").read_bytes().splitlines(keepends=True)
    assert lines and all(json.loads(line)["id"] for line in lines) and lines[-1].endswith(b"\n")
    assert f"{len(lines)} of 600 problems are safe" in err and "same command" in err


def test_a_reader_that_leaves_is_no_traceback(given):
    child = shell("solve", PROBLEM, *given, "--n", "4")
    child.stdout.close()
    assert "Traceback" not in child.stderr.read()
    assert child.wait(timeout=60) == 1


# --- fit, and the method that it chooses ---------------------------------------------------------------------------------


def test_a_strategy_is_fitted_to_runs_and_chooses_for_others(run, given, tmp_path):
    task = ["--task", "embedded", "--split", "calibration", "--limit", 10]

    def evaluated(name, *argv):
        assert run("eval", *given, *task, "--out", tmp_path / name, *argv)[0] == 0
        return tmp_path / name

    pilot = evaluated("pilot", "--method", "best_of_n", "--n", 6, "--seed", 1)
    runs = [evaluated("cot", "--method", "cot"), evaluated("beam", "--n", 4)]
    file = tmp_path / "mine.json"
    code, shown, err = run("fit", *runs, "--pilot", pilot, "--draws", 2, "--out", file, "--json")
    told = json.loads(shown.splitlines()[-1])
    assert (code, err) == (0, "") and "policy with prm: 10 calibration problems of embedded" in shown and "predicted by 2" in shown
    assert told["strategy"] == json.loads(file.read_text()) and told["strategy"]["name"] == "mine"
    # models made of random numbers solve nothing: greedy is the cheapest way to that, for all problems
    assert {pick["method"]["name"] for pick in told["strategy"]["tables"][0]["picks"]} == {"cot"}
    own = [argument for argument in given if argument not in ("--max-steps", "4")]
    code, shown, _ = run("solve", PROBLEM, *own, "--method", "auto", "--strategy", file, "--n", 4, "--json")
    record = json.loads(shown.splitlines()[-1])
    assert code == 0 and record["method"]["name"] == "cot" and record["choice"]["by"] == "no need"
    assert "method: cot n=1, which mine has for all problems" in shown

    strategy = json.loads(file.read_text())
    hard = [pick for pick in strategy["tables"][0]["picks"] if pick["n"] == 4 and pick["bin"] == "hard"]
    hard[0]["method"] = json.loads((tmp_path / "beam" / "run.json").read_text())["method"]
    file.write_text(json.dumps(strategy))
    auto = ["--method", "auto", "--strategy", file, "--n", 4]
    for how, by in (([], "predicted"), (["--difficulty", pilot], "known")):
        code, shown, err = run("eval", *own, *task, *auto, *how, "--out", tmp_path / by, "--json")
        assert err.splitlines()[-1] == "the strategy was fitted on these problems: what it gains on them is in part luck"
        assert code == 0 and json.loads(shown.splitlines()[-1])["method"] == "auto" and json.loads(shown.splitlines()[-1])["n"] == 4
        records = [json.loads(line) for line in (tmp_path / by / "problems.jsonl").read_text().splitlines()]
        assert {record["choice"]["by"] for record in records} == {by}
        assert all((record["method"]["name"] == "beam") == (record["choice"]["bin"] == "hard") for record in records)
        code, shown, _ = run("score", tmp_path / by)
        assert code == 0 and "all as their records say" in shown

    refused = [
        (["fit", *runs, "--pilot", tmp_path / "beam", "--out", file], "beam is a run of beam: only independent draws"),
        (["fit", tmp_path / "predicted", "--pilot", pilot, "--out", file], "is a run of 'auto', and a strategy chooses among cot"),
        (
            ["eval", *own, *task, *auto, "--seed", 1, "--difficulty", pilot, "--out", tmp_path / "x"],
            "share their draws, both of seed 1",
        ),
        (["eval", *own, *task[:-1], 12, *auto, "--difficulty", pilot, "--out", tmp_path / "x"], "how hard 2 of the problems are"),
        (["solve", PROBLEM, *own, *auto, "--n", 16], "no method for easy problems at n=16; its budgets: 1, 4"),
        (["solve", PROBLEM, "--method", "auto", "--strategy", file, "--n", 4], "no table for policy-s with prm-good"),
    ]
    for argv, words in refused:
        code, shown, err = run(*argv)
        assert (code, shown) == (2, "") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


# --- score, rescore, convert ----------------------------------------------------------------------------------------------


def test_a_run_is_scored_again_and_read_by_another_prm(run, given, models, tmp_path):
    source, out = tmp_path / "run", tmp_path / "run-by-prm2"
    random_prm_directory(tmp_path / "prm2", "qwen2.5-math-prm")
    task = ["--task", "embedded", "--split", "calibration", "--limit", 3]
    assert run("eval", *given, *task, "--method", "beam", "--n", 4, "--out", source)[0] == 0
    code, shown, err = run("score", source, "--json")
    *lines, last = shown.splitlines()
    assert (code, err) == (0, "") and lines[-1] == "all as their records say" and "last_vote" in shown
    assert json.loads(last) == {"problems": 3, "failed": 0, "correct": 0, "changed": [], "aggregates": dict.fromkeys(
        ["majority", "last_max", "last_vote", "min_max", "min_vote", "mean_max", "mean_vote"], 0)}  # fmt: skip
    code, shown, _ = run("rescore", source, "--prm", tmp_path / "prm2", "--json")
    assert code == 0 and json.loads(shown.splitlines()[-1])["out"] == str(out) and "as prm2 reads it: 3 problems" in shown
    ours, theirs = ([json.loads(line) for line in (d / "problems.jsonl").read_text().splitlines()] for d in (out, source))
    assert [r["id"] for r in ours] == [r["id"] for r in theirs]
    for new, old in zip(ours, theirs, strict=True):
        assert [node["tokens"] for node in new["nodes"]] == [node["tokens"] for node in old["nodes"]]
        assert not {node["score"] for node in new["nodes"]} & {node["score"] for node in old["nodes"]}
    assert run("rescore", source, "--prm", tmp_path / "prm2")[0] == 0  # nothing left to do
    assert len((out / "problems.jsonl").read_text().splitlines()) == 3
    code, shown, err = run("rescore", source, "--prm", models / "prm", "--out", out)
    assert (code, shown) == (2, "") and "was made with prm." in err and err.count("\n") == 1
    code, shown, err = run("rescore", source, "--prm", models / "prm", "--out", source)
    assert (code, shown) == (2, "") and "is the run itself" in err and err.count("\n") == 1


def test_a_run_and_a_file_are_diagnosed(run, given, models, tmp_path):
    source, file = tmp_path / "run", tmp_path / "solutions.jsonl"
    task = ["--task", "embedded", "--split", "calibration", "--limit", 3]
    assert run("eval", *given, *task, "--method", "best_of_n", "--n", 2, "--out", source)[0] == 0
    code, shown, err = run("diagnose", source, "--json")
    told = json.loads(shown.splitlines()[-1])
    assert (code, err) == (0, "") and told.pop("out") == str(source / "diagnostics.json")
    assert told == json.loads((source / "diagnostics.json").read_text()) and told["subject"]["source"] == "run"
    assert f"{told['problems']} problems, {told['solutions']} solutions" in shown and "steps by length" in shown
    file.write_text(json.dumps({"id": "1", "problem": "a=1+1;a?", "steps": ["a=1+1=3", "\\boxed{3}"], "label": 0}) + "\n")
    code, shown, err = run("diagnose", file, "--prm", models / "prm", "--threshold", 0.4, "-o", tmp_path / "told.json", "--json")
    told = json.loads(shown.splitlines()[-1])
    assert (code, err, told["first_errors"], told["agreement"]["threshold"]) == (0, "", 1, 0.4)
    assert told.pop("out") == str(tmp_path / "told.json") and told == json.loads((tmp_path / "told.json").read_text())
    assert run("diagnose", source, "--prm", models / "prm")[0] == 0 and not (tmp_path / "diagnostics.json").exists()


def test_a_record_that_says_otherwise_is_told_and_a_damaged_one_refused(run, given, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in ("a=1+1;a?", "1+" * 400 + "1?")))
    source = tmp_path / "run"
    assert run("eval", *given, "--task", task, "--method", "majority", "--n", 2, "--out", source)[0] == 1
    records = [json.loads(line) for line in (source / "problems.jsonl").read_text().splitlines()]
    [solved] = [record for record in records if record["error"] is None]
    solved["correct"] = True
    (source / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, shown, _ = run("score", source, "--json")
    assert code == 0 and f"1 problems come out otherwise than their records say, {solved['id']} among them" in shown
    assert json.loads(shown.splitlines()[-1])["changed"] == [solved["id"]] and json.loads(shown.splitlines()[-1])["failed"] == 1
    records[0]["nodes"] = "none"
    (source / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for argv in (["score", source], ["rescore", source, "--prm", "prm-good", "--out", tmp_path / "out"]):
        code, shown, err = run(*argv)
        assert (code, shown) == (2, "") and "line 1 is no record of a search" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pickled_policy_is_converted_and_solves_as_before(run, given, models, tmp_path):
    import torch
    from safetensors.torch import load_file

    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for path in (models / "policy").glob("*.json"):
        (old / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(models / "policy" / "model.safetensors"), old / "pytorch_model.bin")
    code, shown, err = run("convert", old, new, "--json")
    told = json.loads(shown.splitlines()[-1])
    assert (code, err) == (0, "") and told["files"] == 1 and told["out"] == str(new) and f"{told['tensors']} tensors, " in shown
    answers = [run("solve", PROBLEM, *given, "--policy", policy, "--n", 4, "--json")[1] for policy in (models / "policy", new)]
    before, after = (json.loads(answer.splitlines()[-1])["nodes"] for answer in answers)
    assert before == after
    code, shown, err = run("convert", old, new)
    assert (code, shown) == (2, "") and "exists; give the name of a directory to be made" in err and err.count("\n") == 1


# --- info -----------------------------------------------------------------------------------------------------------------


def test_info_reads_no_weights(run, models, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((models / "policy" / "config.json").read_text())
    code, out, _ = run("info", "--policy", tmp_path / "bare", "--json")
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert report["installation"]["extension"] is True and report["installation"]["threads"] >= 1
    [model] = report["models"]
    # 2 layers, 2 KV heads of 8: K and V in float32; per layer 32 * (2*32 + 2*16 + 3*48) weights, two FLOPs each
    assert model["kv_bytes_per_token"] == {"float32": 256, "bfloat16": 128, "int8": 128, "fp8": 128}
    assert model["flops_per_token"] == 2 * 2 * 32 * (64 + 32 + 144)
    assert "Qwen2ForCausalLM" in out and "KV bytes/token" in out
