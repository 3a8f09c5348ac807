"""Choosing anew among stored trees: the same as the search chose, by hand and from real runs, and nothing but sound records."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tts_engine.branch import child_identity
from tts_engine.config import EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import RunError
from tts_engine.runs import PROBLEMS, RUN, Run, describe_run, evaluate, outcome, read_run
from tts_engine.score import read_trees, score
from tts_engine.search import make_method
from tts_engine.tasks.grader import Grader
from tts_engine.tasks.problems import load_task
from tts_engine.testing import random_policy_directory, random_prm_directory

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"block_size": 8, "max_step_tokens": 12, "max_rows": 8, "kv_bytes": 4 << 20}


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def make_record(name, paths, *, rules="paper", gold="12", **changed):
    """A record as best-of-N leaves it. paths: (answer, scores) of each trajectory, which shows its answer in its last step."""
    nodes, branches = [], []
    for number, (answer, scores) in enumerate(paths):
        parent = -1
        for depth, value in enumerate(scores):
            text = "a step\n\n" if depth + 1 < len(scores) else f"\\boxed{{{answer}}}" if answer is not None else "no idea"
            identity = child_identity(number, (number,), depth)
            nodes.append({"parent": parent, "tokens": [1, 2], "text": text, "score": value, "finish": None,
                          "identity": f"{identity:016x}", "lane": [], "draw": number})  # fmt: skip
            parent = len(nodes) - 1
        branches.append({"node": parent, "answer": answer, "group": answer})
    method = make_method("best_of_n", n=len(paths), rules=rules)
    return {
        "schema_version": 1, "id": name, "problem": "2 + 2?", "gold": gold, "level": None,
        "method": {"name": method.name, **asdict(method)}, "seed": 0, "answer": None, "correct": False, "aggregates": {},
        "branches": branches, "prompt_tokens": [5], "nodes": nodes, "ledger": {"policy": {}, "prm": {}, "seconds": 1.0},
        "error": None, "seconds": 1.0,
    } | changed  # fmt: skip


def write_run(directory, *records, **changed):
    directory.mkdir(exist_ok=True)
    (directory / RUN).write_text(json.dumps({"schema_version": 1} | changed))
    (directory / PROBLEMS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


# --- what is chosen -------------------------------------------------------------------------------------------------------

# answer  steps       last  min   mean      sums: last 11 .95  12 1.1  13 .7  14 .6 | min 11 .1  12 .8  13 .7  14 .3
# 11      .1 .95      .95   .1    .525            mean 11 .525  12 .95  13 .75  14 .45
# 12      .5 .6       .6    .5    .55
# 12      .3 .5       .5    .3    .4
# 13      .8 .7       .7    .7    .75
# 14      .1 .4       .4    .1    .25      14 has the most trajectories and no weight
PATHS = [("11", [0.1, 0.95]), ("12", [0.5, 0.6]), ("12", [0.3, 0.5]), ("13", [0.8, 0.7]), ("14", [0.1, 0.4]), ("14", [0.1, 0.1]),
         ("14", [0.1, 0.1]), (None, [1.0, 1.0])]  # fmt: skip
CHOSEN = {"majority": "14", "last_max": "11", "last_vote": "12", "min_max": "13", "min_vote": "12", "mean_max": "13",
          "mean_vote": "12"}  # fmt: skip


def test_all_seven_ways_to_choose_worked_by_hand(tmp_path, grader):
    scored = score(write_run(tmp_path, make_record("p", PATHS)), grader)
    [record] = scored.records
    assert record["answer"] == "12" and record["correct"] is True
    assert record["aggregates"] == {name: {"answer": a, "correct": a == "12"} for name, a in CHOSEN.items()}
    assert scored.changed == ["p"]  # the record said nothing of it


def test_without_scores_there_is_a_majority_and_without_a_gold_no_verdict(tmp_path, grader):
    bare = make_record("p", [(answer, [None] * len(scores)) for answer, scores in PATHS], gold=None)
    [record] = score(write_run(tmp_path, bare), grader).records
    assert record["aggregates"] == {"majority": {"answer": "14", "correct": None}}
    assert record["answer"] == "14" and record["correct"] is None


HALVES = [("1/2", [0.3]), ("3", [0.5]), (r"\frac12", [0.4])]


@pytest.mark.parametrize(
    ("rules", "grouping", "answer"),
    [("paper", None, "3"), ("sal", None, "1/2"), ("paper", "canonical", "1/2"), ("sal", "exact", "3")],
)
def test_equal_answers_are_grouped_as_the_runs_rules_say_unless_told_otherwise(tmp_path, grader, rules, grouping, answer):
    [record] = score(write_run(tmp_path, make_record("p", HALVES, rules=rules, gold="3")), grader, grouping).records
    assert record["aggregates"]["last_vote"] == {"answer": answer, "correct": answer == "3"}


def test_a_record_that_says_otherwise_is_named_and_one_that_agrees_is_not(tmp_path, grader):
    record = make_record("a", PATHS)
    right = record | {"answer": "12", "correct": True}
    right["aggregates"] = {name: {"answer": a, "correct": a == "12"} for name, a in CHOSEN.items()}
    wrong = [right | {"id": "b", "correct": False}, right | {"id": "c", "answer": "11"},
             right | {"id": "d", "aggregates": right["aggregates"] | {"min_max": {"answer": "13", "correct": True}}},
             right | {"id": "e", "branches": [branch | {"answer": "15"} for branch in right["branches"]]}]  # fmt: skip
    failed = make_record("f", PATHS) | {"error": "too long", "ledger": None, "nodes": [], "branches": []}
    scored = score(write_run(tmp_path, right, *wrong, failed), grader)
    assert scored.changed == ["b", "c", "d", "e"]
    assert scored.records[0] == outcome(right) and scored.records[-1] == outcome(failed)
    assert all(record["correct"] is True for record in scored.records[:-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    random_prm_directory(directory / "prm", "math-shepherd")
    return directory


METHODS = [
    make_method("cot", max_steps=4),
    make_method("majority", n=4, max_steps=4),
    make_method("best_of_n", n=4, max_steps=4),
    make_method("beam", n=4, max_steps=4),
    make_method("beam", n=4, max_steps=4, rules="reference"),
    make_method("dvts", n=4, max_steps=4, rules="sal"),
    make_method("rebase", n=4, max_steps=4),
    make_method("adaptive", n=4, max_steps=4, batch=1, vote="mean_max", bound=0.3, budget="1e12flops"),
]


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """A run directory for each of METHODS."""
    top, problems = tmp_path_factory.mktemp("runs"), load_task("embedded", "calibration", 3)
    prm = models / "prm"
    with Engine.from_pretrained(models / "policy", prm, **SETTINGS) as engine:
        for number, method in enumerate(METHODS):
            description = describe_run(policy=models / "policy", prm=prm, config=EngineConfig(**SETTINGS), method=method, seed=1,
                                       task="embedded", split="calibration", limit=3, problems=problems)  # fmt: skip
            with Run(top / str(number), description) as run:
                evaluate(engine, problems, method, run, seed=1, finished=lambda record: None)
    return top


@pytest.mark.parametrize("number", range(len(METHODS)), ids=lambda number: METHODS[number].name)
def test_a_runs_own_records_come_out_as_they_are(runs, grader, number):
    directory = runs / str(number)
    scored = score(directory, grader)
    assert scored.changed == []
    assert scored.records == [outcome(record) for record in read_run(directory)] and len(scored.records) == 3
    for stored in read_trees(directory):
        assert stored.method == METHODS[number]
        assert [len(node.steps) for node in stored.nodes] == sorted(len(node.steps) for node in stored.nodes)
        assert stored.branches and all(branch in stored.nodes for branch in stored.branches)


def test_a_torn_last_line_is_left_out_and_nothing_is_written(runs, grader, tmp_path):
    content = (runs / "2" / PROBLEMS).read_bytes()
    for name, data in ((RUN, (runs / "2" / RUN).read_bytes()), (PROBLEMS, content[:-40])):
        (tmp_path / name).write_bytes(data)
    assert len(score(tmp_path, grader).records) == 2
    assert (tmp_path / PROBLEMS).read_bytes() == content[:-40]


def test_no_model_and_no_torch_is_needed(tmp_path):
    write_run(tmp_path, make_record("p", PATHS))
    command = ("import sys; from tts_engine import cli; cli.main(sys.argv[1:]); "
               "print(*sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))")  # fmt: skip
    argv = [sys.executable, "-c", command, "score", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "" and "last_vote  100.0" in done.stdout


# --- what is refused ------------------------------------------------------------------------------------------------------


def changed(**fields):
    return lambda record: record | fields


def node(number, **fields):
    def change(record):
        nodes = [old | fields if place == number else old for place, old in enumerate(record["nodes"])]
        return record | {"nodes": nodes}

    return change


BAD = {
    "another schema": (changed(schema_version=2), "schema_version is 2 and not 1"),
    "no nodes": (lambda r: {key: value for key, value in r.items() if key != "nodes"}, "no field 'nodes'"),
    "no text": (changed(problem=7), "problem is 7, not a text"),
    "a gold that is a number": (changed(gold=4), "gold is 4, not a text"),
    "half a character": (changed(problem="\ud800"), "surrogates not allowed"),
    "no ledger": (changed(ledger=None), "it has no ledger"),
    "an unknown method": (changed(method={"name": "mcts"}), "no method 'mcts'"),
    "an unknown setting": (changed(method={"name": "cot", "n": 4}), "cot has no setting 'n'"),
    "a method that is a name": (changed(method="cot"), "mapping"),
    "an unknown rule": (changed(method={"name": "best_of_n", "n": 8, "rules": {"voted": "all"}}), "no rule voted='all'"),
    "nodes that are a number": (changed(nodes=7), "not iterable"),
    "nodes that are lists": (changed(nodes=[[1]]), "indices"),
    "a parent below": (node(0, parent=1), "node 0 has the parent 1"),
    "its own parent": (node(1, parent=1), "node 1 has the parent 1"),
    "a parent before the prompt": (node(1, parent=-2), "node 1 has the parent -2"),
    "a score above one": (node(2, score=1.5), "node 2 has the score 1.5"),
    "a score that is NaN": (node(2, score=float("nan")), "Out of range float values are not JSON"),
    "a score that is a text": (node(2, score="high"), "not supported"),
    "one score missing": (node(1, score=None), "some of its voted branches carry scores and some do not"),
    "one identity twice": (lambda r: node(1, identity=r["nodes"][0]["identity"])(r), "two of its nodes have one identity"),
    "the prompt's identity": (node(0, identity="0"), "two of its nodes have one identity"),
    "an identity that is no number": (node(0, identity="x"), "invalid literal"),
    "an unknown end": (node(0, finish="tired"), "'tired' is not a valid Finish"),
    "a text that is a list": (node(0, text=["a"]), "text is ['a'], not a text"),
    "a vote on a node that is not": (changed(branches=[{"node": 99}]), "none of its 16 nodes"),
    "a vote on the prompt": (changed(branches=[{"node": -1}]), "none of its 16 nodes"),
    "an id twice": (changed(id="a"), "its id 'a' is that of line 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_record_that_no_search_wrote_is_one_sentence_with_its_line(tmp_path, grader, kind):
    change, words = BAD[kind]
    write_run(tmp_path, make_record("a", PATHS), change(make_record("b", PATHS)), make_record("c", PATHS))
    with pytest.raises(RunError) as refusal:
        score(tmp_path, grader)
    message = str(refusal.value)
    assert f"{PROBLEMS} line 2 is no record of a search: " in message and words in message and "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / RUN).unlink(), f"{RUN} cannot be read: No such file"),
        (lambda d: (d / PROBLEMS).unlink(), f"{PROBLEMS} cannot be read: No such file"),
        (lambda d: (d / RUN).write_text("[" * 100_000), f"{RUN} cannot be read: not JSON"),
        (lambda d: (d / RUN).write_text('{"schema_version": NaN}'), f"{RUN} cannot be read: not JSON"),
        (lambda d: (d / RUN).write_text('{"schema_version": 2}'), "was written with schema_version 2; this version reads 1"),
        (lambda d: (d / RUN).write_text("{}"), "was written with schema_version None"),
        (lambda d: (d / PROBLEMS).write_text("{}\n" + (d / PROBLEMS).read_text()), "line 1 is damaged"),
        (lambda d: (d / PROBLEMS).write_text("[" * 100_000 + "\n" + (d / PROBLEMS).read_text()), "line 1 is damaged"),
        (lambda d: (d / PROBLEMS).write_text('{"id": [1]}\n' + (d / PROBLEMS).read_text()), "line 1 is damaged"),
        (lambda d: (d / PROBLEMS).write_text((d / PROBLEMS).read_text()[:-9]), "holds no finished problem yet"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, grader, spoil, words):
    write_run(tmp_path, make_record("a", PATHS))
    spoil(tmp_path)
    with pytest.raises(RunError) as refusal:
        score(tmp_path, grader)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
