"""Sweeps: what is drawn once is what each cell would have drawn, costs what it would have cost, and survives being broken off."""

import json
import shutil
from dataclasses import asdict, replace

import pytest

from tts_engine.engine import Engine
from tts_engine.errors import EngineError, RunError
from tts_engine.ledger import Ledger
from tts_engine.report.progress import Progress
from tts_engine.runs import PROBLEMS, RUN, Run, describe_result, read_description, read_run
from tts_engine.score import score
from tts_engine.search import make_method
from tts_engine.strategy.choose import SCHEMA_VERSION, Pick, Strategy, Table
from tts_engine.strategy.difficulty import absolute_bins
from tts_engine.sweep import SWEEP, is_sweep, make, read_sweep, read_sweep_description
from tts_engine.sweep.make import Sweep
from tts_engine.sweep.plan import plan
from tts_engine.sweep.recipe import RecipeError, load_recipe, recipe_of
from tts_engine.tasks.grader import Grader
from tts_engine.tasks.problems import load_task
from tts_engine.testing import random_policy_directory, random_prm_directory

ENGINE = {"block_size": 4, "max_step_tokens": 12, "max_rows": 8, "kv_bytes": 4 << 20, "deterministic": True, "system": ""}
METHODS = [
    {"name": "cot", "max_steps": 4},
    {"name": "majority", "n": [1, 4], "max_steps": 4},
    {"name": "best_of_n", "n": [2, 6], "max_steps": 4},
    {"name": "beam", "n": 4, "width": 2, "max_steps": 4},
    {"name": "dvts", "n": [2, 4], "width": 2, "max_steps": 4},
]
NUM_PROBLEMS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a PRM with room for everything, and one in which the longest of its draws do not fit."""
    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    random_prm_directory(directory / "wide", "math-shepherd", seed=2)
    random_prm_directory(directory / "narrow", "qwen2.5-math-prm", seed=2, max_position_embeddings=72)
    return directory


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "sums.jsonl"
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in load_task("embedded", "calibration", NUM_PROBLEMS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(models, problems, **changed):
    data = {"task": str(problems), "seed": 1, "policies": [str(models / "policy")], "engine": ENGINE, "methods": METHODS}
    return recipe_of(data | {"prms": [str(models / "wide"), str(models / "narrow")]} | changed, "recipe")


def swept(recipe, directory, after=None):
    """Make a sweep; with `after`, interrupted once so many problems are on the disk."""
    with Sweep(recipe, directory) as sweep, Progress(len(sweep.cells) * len(sweep.problems)) as progress:
        told = progress.advance

        def advance(record):
            told(record)
            if progress.finished - progress.earlier == after:
                raise KeyboardInterrupt

        progress.advance = advance
        return sweep.make(progress)


@pytest.fixture(scope="module")
def whole(models, problems, tmp_path_factory):
    """A sweep that nobody disturbed."""
    directory = tmp_path_factory.mktemp("sweep") / "whole"
    swept(recipe(models, problems), directory)
    return directory


def by_id(directory):
    return {record["id"]: record for record in read_run(directory)}


def essence(record):
    return {key: value for key, value in record.items() if key not in ("ledger", "seconds", "made")}


def counted(record):
    """What was drawn, scored and held, and the cost that follows from it."""
    ledger = Ledger.from_dict(record["ledger"])
    names = ("tokens_generated", "tokens_unshared", "tokens_accepted", "steps_scored", "tokens_reread", "ideal_flops",
             "kv_distinct_bytes", "kv_logical_bytes")  # fmt: skip
    parts = {part: asdict(getattr(ledger, part)) for part in ("policy", "prm")}
    return {(part, name): own[name] for part, own in parts.items() for name in names if name in own} | {"all": ledger.asked_flops}


def without_clock(record):
    return {part: record["ledger"][part] for part in ("policy", "prm")}


# --- the plan -------------------------------------------------------------------------------------------------------------


def planned(**changed):
    data = {"task": "embedded", "policies": ["policy-s"], "prms": ["prm-good"]}
    return [(cell.name, cell.made, cell.source) for cell in plan(recipe_of(data | changed, "recipe"))]


def test_what_needs_no_prm_is_drawn_once_a_policy_and_every_cell_stands_behind_its_source():
    cells = planned(prms=["prm-good", "prm-poor"], pilot={"n": 8, "seed": 1}, methods=[
        {"name": "cot"}, {"name": "beam", "n": [4, 8]}, {"name": "majority", "n": [1, 4]}, {"name": "best_of_n", "n": [4, 16]},
        {"name": "dvts", "n": [4, 8]}, {"name": "dvts", "n": 4, "width": 2}])  # fmt: skip
    under = [
        [
            (f"policy-s-{prm}-best_of_n-n16", "rescored", "policy-s-majority-n16"),
            (f"policy-s-{prm}-best_of_n-n4", "replayed", f"policy-s-{prm}-best_of_n-n16"),
            (f"policy-s-{prm}-dvts-n8", "searched", None),
            (f"policy-s-{prm}-dvts-n4", "replayed", f"policy-s-{prm}-dvts-n8"),
            (f"policy-s-{prm}-dvts-n4-2", "searched", None),
            (f"policy-s-{prm}-beam-n4", "searched", None),
            (f"policy-s-{prm}-beam-n8", "searched", None),
        ]
        for prm in ("prm-good", "prm-poor")
    ]
    assert cells == [
        ("policy-s-pilot-n8", "searched", None),
        ("policy-s-cot", "searched", None),
        ("policy-s-majority-n16", "searched", None),  # nobody asked for it, but best-of-N draws it
        ("policy-s-majority-n4", "replayed", "policy-s-majority-n16"),
        ("policy-s-majority-n1", "replayed", "policy-s-majority-n16"),
        *under[0],
        *under[1],
    ]


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (
            [{"name": "best_of_n", "n": [2, 4]}],
            [("prm-good-best_of_n-n4", "searched", None), ("prm-good-best_of_n-n2", "replayed", "prm-good-best_of_n-n4")],
        ),
        (
            [{"name": "majority", "n": 8}, {"name": "best_of_n", "n": 4}],
            [("majority-n8", "searched", None), ("prm-good-best_of_n-n4", "rescored", "majority-n8")],
        ),
        (
            [{"name": "majority", "n": 4, "temperature": 1.0}, {"name": "best_of_n", "n": 4}],
            [("majority-n4", "searched", None), ("prm-good-best_of_n-n4", "searched", None)],
        ),
        (
            [{"name": "majority", "n": 4, "max_steps": 9}, {"name": "majority", "n": 8}],
            [("majority-n8", "searched", None), ("majority-n4", "searched", None)],
        ),
        (
            [{"name": "dvts", "n": [8, 4], "rules": "sal"}, {"name": "dvts", "n": 4}, {"name": "rebase", "n": [8, 4]}],
            [("prm-good-dvts-n8", "searched", None), ("prm-good-dvts-n4", "replayed", "prm-good-dvts-n8"),
             ("prm-good-dvts-n4-2", "searched", None), ("prm-good-rebase-n8", "searched", None),
             ("prm-good-rebase-n4", "searched", None)],
        ),
    ],
)  # fmt: skip
def test_only_what_has_the_same_draws_is_made_from_them(methods, expected):
    assert planned(methods=methods) == [
        (f"policy-s-{name}", made, source and f"policy-s-{source}") for name, made, source in expected
    ]


def test_a_method_may_be_for_some_policies_only():
    methods = [{"name": "cot"}, {"name": "majority", "n": 4, "policies": ["policy-s"]}]
    names = [name for name, _, _ in planned(policies=["policy-s", "policy-l"], methods=methods)]
    assert names == ["policy-s-cot", "policy-s-majority-n4", "policy-l-cot"]


# --- exact ----------------------------------------------------------------------------------------------------------------


def test_every_cell_is_the_run_that_it_would_have_been_alone(models, problems, whole):
    seen = []
    for prm in ("wide", "narrow"):
        with Engine.from_pretrained(models / "policy", models / prm, **ENGINE) as engine:
            for cell in plan(recipe(models, problems)):
                if cell.prm not in (None, str(models / prm)) or (cell.prm is None and prm == "narrow"):
                    continue
                records = by_id(whole / cell.directory)
                assert len(records) == NUM_PROBLEMS
                if cell.made == "searched":
                    engine.forget()
                    alone = engine.search(load_task(problems), cell.method, seed=1)
                for i, problem in enumerate(load_task(problems)):
                    if cell.made != "searched":
                        engine.forget()
                        [result] = engine.search(problem, cell.method, seed=1)
                    else:
                        result = alone[i]
                    ref, out = describe_result(result, engine.grader), records[problem.id]
                    assert essence(out) == essence(ref)
                    assert counted(out) == counted(ref)
                    seen.append((cell.made, out.get("made", "searched"), cell.method.uses_prm))
                    if seen[-1][1] == "searched":
                        assert "made" not in out and out["seconds"] > 0
                    else:
                        assert out["seconds"] == out["ledger"]["seconds"] == 0
                        assert Ledger.from_dict(out["ledger"]).flops == counted(out)["all"]
                    if cell.made == "searched":
                        assert without_clock(out) == without_clock(json.loads(json.dumps(ref)))
    assert {("searched", "searched", True), ("replayed", "replayed", False), ("replayed", "replayed", True),
            ("rescored", "rescored", True), ("rescored", "searched", True)} <= set(seen)  # fmt: skip


def test_a_sweep_is_a_directory_of_runs_that_say_what_they_are_made_from(models, problems, whole):
    description = read_sweep_description(whole)
    assert is_sweep(whole) and not is_sweep(whole / "runs")
    cells = description["cells"]
    assert read_sweep(whole) == [whole / cell["directory"] for cell in cells] and len(cells) == 14
    assert set(cells[0]) >= {"policy", "prm", "method", "n", "seed", "directory", "made", "from"}
    assert description["recipe"]["limit"] is None and description["recipe"]["methods"] == METHODS
    assert description["engine"]["max_tokens"] == 8192 and description["versions"]["torch"]
    for part in ("policies", "prms"):
        assert all("model.safetensors" in model["sha256"] for model in description[part].values())
    with Grader() as grader:
        for cell in cells:
            run = read_description(whole / cell["directory"])
            assert (run["method"]["name"], run["seed"]) == (cell["method"], 1) and run["method"].get("n", 1) == cell["n"]
            assert run["policy"]["sha256"] == description["policies"][cell["policy"]]["sha256"]
            assert (run["prm"] is None) == (cell["prm"] is None)
            assert run["task"]["problems_sha256"] == description["task"]["problems_sha256"]
            assert ("derived" in run) == (cell["made"] != "searched") == (cell["from"] is not None)
            if cell["from"] is not None:
                assert run["derived"]["made"] == cell["made"] and cell["from"].endswith(run["derived"]["name"])
                assert run["derived"]["problems"] == NUM_PROBLEMS and set(run["derived"]["sha256"]) == {RUN, PROBLEMS}
            assert score(whole / cell["directory"], grader).changed == []


def test_models_are_swapped_only_when_needed_and_not_loaded_for_what_is_there(models, problems, whole, tmp_path, monkeypatch):
    loads = []

    class Counted(Engine):
        @classmethod
        def from_pretrained(cls, *given, **settings):
            loads.append([path.name for path in given])
            return super().from_pretrained(*given, **settings)

    monkeypatch.setattr(make, "Engine", Counted)
    made = swept(recipe(models, problems), tmp_path / "sweep")
    assert loads == [["policy", "wide"], ["policy", "narrow"]]
    again = swept(recipe(models, problems), tmp_path / "sweep")
    assert len(loads) == 2 and [one.as_dict() for one in again] == [one.as_dict() for one in made]
    assert [one.cell.name for one in made[:4]] == ["policy-cot", "policy-majority-n1", "policy-majority-n4", "policy-majority-n6"]
    assert all(one.outcome.ledger.asked_flops <= one.outcome.ledger.flops for one in made)


# --- broken off -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [5, 22])
def test_a_sweep_that_is_interrupted_goes_on_to_what_it_would_have_been(models, problems, whole, tmp_path, after):
    for times in (after, 9):
        with pytest.raises(KeyboardInterrupt):
            swept(recipe(models, problems), tmp_path / "sweep", after=times)
    swept(recipe(models, problems), tmp_path / "sweep")
    for cell in read_sweep_description(whole)["cells"]:
        ours, theirs = by_id(tmp_path / "sweep" / cell["directory"]), by_id(whole / cell["directory"])
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert essence(ours[name]) == essence(theirs[name]) and counted(ours[name]) == counted(theirs[name])


def test_a_torn_line_is_made_again_and_a_changed_source_is_refused(models, problems, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "sweep")
    file = tmp_path / "sweep" / "runs" / "policy-majority-n1" / PROBLEMS
    content = file.read_bytes()
    file.write_bytes(content[:-50])
    swept(recipe(models, problems), tmp_path / "sweep")
    assert file.read_bytes() == content
    source = tmp_path / "sweep" / "runs" / "policy-majority-n6" / PROBLEMS
    source.write_bytes(source.read_bytes().replace(b'"seconds":', b'"seconds": '))
    with pytest.raises(RunError, match=rf"policy-majority-n4 was made with derived.sha256.{PROBLEMS}="):
        swept(recipe(models, problems), tmp_path / "sweep")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2}, "was made with recipe.seed=1, not recipe.seed=2;"),
        ({"limit": 2}, "was made with recipe.limit=none and limit=none, not recipe.limit=2"),
        ({"engine": ENGINE | {"max_rows": 4}}, "max_rows=8"),
        ({"methods": METHODS[:1]}, "recipe.methods="),
        ({"prms": []}, "recipe.prms="),
    ],
)
def test_another_recipe_is_refused_in_one_sentence(models, problems, whole, changed, words):
    if "prms" in changed:
        changed |= {"methods": METHODS[:2]}
    with pytest.raises(RunError) as refusal:
        Sweep(recipe(models, problems, **changed), whole)
    assert words in str(refusal.value) and "choose another --out" in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_weights_and_another_writer_are_refused(models, problems, whole, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    shutil.copytree(whole, tmp_path / "sweep")
    directory = tmp_path / "sweep"
    renamed = {"policies": [str(tmp_path / "models" / "policy")]}
    with pytest.raises(RunError, match="recipe.policies="):
        Sweep(recipe(models, problems, **renamed), directory)
    saved = json.loads((directory / SWEEP).read_text())
    saved["policies"][str(models / "policy")]["sha256"]["model.safetensors"] = "0" * 64
    (directory / SWEEP).write_text(json.dumps(saved))
    with pytest.raises(RunError, match="sha256.model.safetensors=000000000000..., not "):
        Sweep(recipe(models, problems), directory)
    with (
        Run(whole / "runs" / "policy-cot", read_description(whole / "runs" / "policy-cot")),
        pytest.raises(RunError, match="another process is writing"),
    ):
        swept(recipe(models, problems), whole)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 9}', '{"schema_version": 1, "cells": [{}]}'])
def test_a_damaged_description_is_one_sentence(tmp_path, text):
    (tmp_path / SWEEP).write_text(text)
    with pytest.raises(RunError, match=SWEEP):
        read_sweep(tmp_path)


# --- what cannot be searched ----------------------------------------------------------------------------------------------


def test_a_problem_that_cannot_be_searched_is_a_record_in_every_cell_and_the_rest_go_on(models, problems, tmp_path):
    file = tmp_path / "long.jsonl"
    short = problems.read_text().splitlines()[0]
    middling, endless = ({"id": f"long-{k}", "problem": "1+" * k + "1", "answer": "9"} for k in (40, 600))
    file.write_text("\n".join([json.dumps(endless), short, json.dumps(middling)]))
    made = swept(recipe(models, file), tmp_path / "sweep")
    for one in made:
        records = by_id(one.directory)
        assert len(records) == 3 and records["long-600"]["error"] and not records["long-600"]["correct"]
        assert (records["long-40"]["error"] is not None) == ("narrow" in one.cell.name)
        assert sum(record["error"] is None for record in records.values()) == 3 - len(one.failed)
    alone = by_id(tmp_path / "sweep" / "runs" / "policy-narrow-beam-n4")["long-40"]["error"]
    assert alone == by_id(tmp_path / "sweep" / "runs" / "policy-narrow-best_of_n-n6")["long-40"]["error"]
    assert "as the PRM reads it" in alone


def test_where_no_problem_fits_the_cell_is_named(models, problems, tmp_path):
    with pytest.raises(EngineError, match="^policy-cot: problem .* may need KV blocks .* 13 more of 14 cells could not be made$"):
        swept(recipe(models, problems, engine=ENGINE | {"kv_bytes": 9000}), tmp_path / "sweep")
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"problem": "1+" * 40 + "1", "answer": "9"}))
    with pytest.raises(EngineError, match="^policy-narrow-dvts-n4: .* 2 more of 14 cells"):
        swept(recipe(models, file), tmp_path / "narrow")
    assert [run.name for run in read_sweep(tmp_path / "narrow") if not by_id(run)] == [
        "policy-narrow-dvts-n4",
        "policy-narrow-beam-n4",
    ]


def test_a_place_that_cannot_be_a_sweep_is_refused(models, problems):
    with pytest.raises(RunError, match="/dev/null/x cannot be used as a sweep's directory"):
        Sweep(recipe(models, problems), "/dev/null/x")


# --- auto and pilots ------------------------------------------------------------------------------------------------------


def test_auto_takes_what_the_pilot_tells_and_the_pilot_is_no_result(models, problems, tmp_path):
    bins = absolute_bins()
    own = ({"name": "cot"}, {"name": "majority", "max_steps": 4}, {"name": "beam", "width": 2, "max_steps": 4})
    picks = tuple(Pick(bin=bin, n=4, method=method) for bin, method in zip(bins.names, own, strict=True))
    strategy = Strategy(schema_version=SCHEMA_VERSION, name="by-hand", source="", tables=(Table(bins=bins, picks=picks),))
    strategy.save(tmp_path / "strategy.json")
    methods = [*METHODS[3:4], {"name": "auto", "n": 4, "strategy": str(tmp_path / "strategy.json")}]
    with pytest.raises(EngineError, match="goes by how hard a problem is and predicts nothing"):
        Sweep(recipe(models, problems, methods=methods), tmp_path / "sweep")
    with pytest.raises(EngineError, match="no strategy and no file"):
        Sweep(recipe(models, problems, methods=[{"name": "auto", "n": 4, "strategy": "none"}]), tmp_path / "sweep")
    told = recipe(models, problems, methods=methods, pilot={"n": 4, "seed": 5})
    made = {one.cell.name: one for one in swept(told, tmp_path / "sweep")}
    assert list(made)[0] == "policy-pilot-n4" and made["policy-pilot-n4"].cell.seed == 5
    assert [run.name for run in read_sweep(tmp_path / "sweep")] == [name for name in made if "pilot" not in name]
    assert [run.name for run in read_sweep(tmp_path / "sweep", pilots=True)] == ["policy-pilot-n4"]
    auto, beam = (by_id(made[f"policy-wide-{name}-n4"].directory) for name in ("auto", "beam"))
    for name, record in auto.items():  # random models solve nothing
        assert record["choice"]["bin"] == "hard" and record["choice"]["by"] == "known"
        assert record["answer"] == beam[name]["answer"] and counted(record) == counted(beam[name])
    assert read_description(made["policy-wide-auto-n4"].directory)["method"]["known"]


# --- recipes --------------------------------------------------------------------------------------------------------------

PLAIN = "task: embedded\npolicies: [policy-s]\nprms: [prm-good]\n"
COT = PLAIN + "methods: [{name: cot}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", " is null, not an object"),
        ("a: [", " line 1 is not YAML: "),
        (PLAIN, " lacks methods"),
        (PLAIN + "methods: []", ": methods is empty"),
        (COT + "policy: x", " has the key 'policy', which is unknown; known: task, split"),
        (COT + "task: math500", " line 5 is not YAML: the key 'task' stands there twice"),
        (COT + "engine: &a {}\nestimate: *a", " is not YAML: an alias, which no recipe has"),
        (COT + "seed: 2026-01-01", " holds what no recipe has: "),
        (COT + "seed: .nan", "NaN is not JSON"),
        (COT + "seed: one", ".seed is \"one\", not a whole number"),
        (COT + "limit: 0", ": limit=0 must be at least 1"),
        (COT + "engine: {blocks: 3}", ": engine has the key 'blocks', which is unknown; known: load, dtype"),
        (COT + "engine: {block_size: x}", ': engine.block_size is "x", not a whole number'),
        (COT + "engine: {kv_bytes: 4T}", ": engine.kv_bytes is '4T', not a number of bytes"),
        (COT + "engine: {dtype: int3}", ": engine: no dtype 'int3'"),
        (COT + "engine: {memory: [1]}", ": engine.memory is [1], not "),
        (COT + "estimate: {utilisation: 2}", ".estimate: utilisation=2.0 must be at most 1"),
        (COT + "estimate: {tokens: 2}", ".estimate has the key 'tokens'"),
        (COT + "pilot: {n: 4, seed: 0}", ": pilot.seed=0 is the methods' seed"),
        (COT + "pilot: {n: 0, seed: 1}", ": pilot: n must be a whole number of at least 1, not 0"),
        (PLAIN + "methods: [{n: 4}]", ": methods[0].name is null, not a text"),
        (PLAIN + "methods: [{name: mcts, n: 4}]", ": methods[0]: no method 'mcts'"),
        (PLAIN + "methods: [{name: cot}, {name: beam, n: [4, 6]}]", ": methods[1]: n=6 must be a multiple of width=4"),
        (PLAIN + "methods: [{name: beam, n: [4], witdh: 2}]", ": methods[0]: beam has no setting 'witdh'"),
        (PLAIN + "methods: [{name: beam, n: []}]", ": methods[0].n is empty"),
        (PLAIN + "methods: [{name: beam, n: 4.5}]", ": methods[0].n[0] is 4.5, not a whole number"),
        (PLAIN + "methods: [{name: beam, n: 4, temperature: hot}]", ': methods[0].temperature is "hot", not a number'),
        (PLAIN + "methods: [{name: beam, n: 4, rules: {}}]", ": methods[0].rules is {}, not a text"),
        (PLAIN + "methods: [{name: beam}]", ": methods[0]: beam needs n"),
        (PLAIN + "methods: [{name: cot, n: 4}]", ": methods[0]: cot has no setting 'n'"),
        (PLAIN + "methods: [{name: beam, n: [4, 4]}]", ": methods has beam n=4 with the same settings twice for policy-s"),
        (PLAIN + "methods: [{name: cot, policies: [policy-x]}]", ": methods[0].policies names 'policy-x', which is none of"),
        (PLAIN + "methods: [{name: cot, policies: []}]", ": no method is for policy-s"),
        (PLAIN + "methods: [{name: auto, n: 4}]", ": methods[0]: auto takes a strategy and n, and nothing else"),
        ("task: embedded\npolicies: [policy-s]\nmethods: [{name: beam, n: 4}]", ": beam needs a PRM, and prms is empty"),
        ("task: embedded\npolicies: [policy-s, policy-s]\nmethods: [{name: cot}]", ": policies names one model twice"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_sentence_that_names_the_place(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as refusal:
        load_recipe(file)
    assert words in str(refusal.value) and str(file) in str(refusal.value)


def test_a_recipe_has_the_defaults_of_an_eval(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(COT.replace("cot", "majority, n: 4, rules: sal, temperature: 1") + "engine: {kv_bytes: 64M}")
    read = load_recipe(file)
    assert read.entries_of("policy-s") == [make_method("majority", n=4, rules="sal", temperature=1.0)]
    assert (read.config.block_size, read.config.kv_bytes, read.split, read.seed) == (8, 64 << 20, "test", 0)
    assert replace(read, policies=("some/model",)).config.block_size == 16
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="longer than 1 MiB"):
        load_recipe(_of_size(tmp_path / "big.yaml", 1 << 21))


def _of_size(file, size):
    file.write_bytes(b" " * size)
    return file
