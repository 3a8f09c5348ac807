"""A PRM diagnosed on runs and on solutions in the form of ProcessBench: the same figures whichever way the same steps come."""

import json
import random
from dataclasses import asdict, replace

import pytest

from tts_engine import embedded
from tts_engine.config import EngineConfig
from tts_engine.diagnose import (
    Sample,
    diagnose_by,
    diagnose_run,
    diagnose_samples,
    read_diagnostics,
    read_processbench,
    save_diagnostics,
)
from tts_engine.embedded import model_path
from tts_engine.engine import Engine
from tts_engine.errors import EngineError, RunError, TaskError
from tts_engine.report import intervals
from tts_engine.rescore import config_of, load_scorer
from tts_engine.runs import PROBLEMS, Run, describe_run, evaluate, read_run
from tts_engine.search import make_method
from tts_engine.tasks.problems import load_task
from tts_engine.tasks.programs import draw_program, solve, step_labels
from tts_engine.testing import random_prm_directory

SETTINGS = {"block_size": 8, "deterministic": True}
NUM_PROBLEMS = 8
METHODS = {"best_of_n": {"n": 4}, "majority": {"n": 4}, "beam": {"n": 4, "width": 2}}
needs_models = pytest.mark.skipif(
    not (embedded.MODELS / "prm-good").is_dir(), reason="needs the embedded models: tts-engine embedded train"
)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "BOOTSTRAPS", 500)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By method, a run of the embedded models on calibration problems."""
    made, problems = {}, load_task("embedded", "calibration", NUM_PROBLEMS)
    with Engine.from_pretrained(model_path("policy-s"), model_path("prm-good"), **SETTINGS) as engine:
        for name, settings in METHODS.items():
            method, directory = make_method(name, **settings), tmp_path_factory.mktemp(name)
            description = describe_run(policy=model_path("policy-s"), prm=model_path("prm-good") if method.uses_prm else None,
                                       config=EngineConfig(**SETTINGS), method=method, seed=0, task="embedded", split="calibration",
                                       limit=NUM_PROBLEMS, problems=problems)  # fmt: skip
            with Run(directory, description) as run:
                evaluate(engine, problems, method, run, seed=0, finished=lambda record: None)
            made[name] = directory
    return made


def samples_of(directory):
    """A run's solutions as ProcessBench would have them, their first errors by the programs."""
    programs = {p.id: p.program for p in load_task("embedded", "calibration", NUM_PROBLEMS)}
    for record in sorted(read_run(directory), key=lambda record: record["id"]):
        for number, voted in enumerate(record["branches"]):
            place, texts = voted["node"], []
            while place >= 0:
                texts.append(record["nodes"][place]["text"])
                place = record["nodes"][place]["parent"]
            labels = step_labels(programs[record["id"]], [text.strip() for text in texts[::-1]])
            yield {"id": f"{record['id']}-{number}", "generator": "policy-s", "problem": record["problem"], "steps": texts[::-1],
                   "label": -1 if all(labels) else labels.index(False),
                   "final_answer_correct": voted["answer"] == record["gold"]}  # fmt: skip


def written(path, samples, lines=True):
    path.write_text("\n".join(map(json.dumps, samples)) + "\n" if lines else json.dumps(list(samples), indent=1))
    return path


def without(record, *names):
    """The record but for what depends on where steps come from."""
    told = asdict(record)
    return {name: value for name, value in told.items() if name not in ("subject", "length", "choice", "missing", "signs", *names)}


# --- runs -----------------------------------------------------------------------------------------------------------------


@needs_models
def test_a_run_tells_of_its_own_scores(runs):
    out = diagnose_run(runs["best_of_n"])
    assert (out.problems, out.solutions, out.missing) == (NUM_PROBLEMS, 4 * NUM_PROBLEMS, {})
    assert (out.subject.policy, out.subject.prm, out.subject.method) == ("policy-s", "prm-good", "best_of_n n=4")
    records = list(read_run(runs["best_of_n"]))
    assert out.steps == sum(len(record["nodes"]) for record in records)
    assert out.first_errors == out.first_error.erroneous  # each wrong solution has one first error
    accuracies = {point.rule: point.accuracy.value for point in out.choice.curve if point.n == 4}
    for rule, accuracy in accuracies.items():
        assert accuracy == pytest.approx(sum(record["aggregates"][rule]["correct"] for record in records) / NUM_PROBLEMS), rule
    assert out.step_scores.auc.value > 0.8 and out.first_error.f1.value > 0.4


@needs_models
def test_the_same_solutions_as_a_file_give_the_same_figures(runs, tmp_path):
    ref, config = diagnose_run(runs["best_of_n"]), config_of(runs["best_of_n"])
    for lines in (True, False):
        file = written(tmp_path / "samples.json", samples_of(runs["best_of_n"]), lines)
        out = diagnose_by(model_path("prm-good"), file, config)
        assert without(out) == without(ref)
        assert (out.subject.form, out.subject.source, out.subject.prm) == ("processbench", "samples.json", "prm-good")
        assert set(out.missing) == {"choice"} and out.subject.labels == "the file"


@needs_models
def test_another_prm_reads_the_trees_of_a_run(runs):
    source, poor = runs["best_of_n"], model_path("prm-poor")
    before = (source / PROBLEMS).read_bytes()
    ref, out = diagnose_run(source), diagnose_by(poor, source, config_of(source))
    assert out.subject.prm == "prm-poor" and (out.steps, out.first_errors) == (ref.steps, ref.first_errors)
    assert out.step_scores.auc.value < ref.step_scores.auc.value
    assert [p.accuracy for p in out.choice.curve if p.rule == "majority"] == [
        p.accuracy for p in ref.choice.curve if p.rule == "majority"
    ]
    assert (source / PROBLEMS).read_bytes() == before
    again = diagnose_by(model_path("prm-good"), source, config_of(source))
    assert replace(again, subject=ref.subject) == ref


@needs_models
def test_a_majority_has_no_scores_of_its_own_and_is_read_like_best_of_n(runs):
    with pytest.raises(RunError, match="holds no scores, because its method read no PRM: give --prm"):
        diagnose_run(runs["majority"])
    out, ref = diagnose_by(model_path("prm-good"), runs["majority"], config_of(runs["majority"])), diagnose_run(runs["best_of_n"])
    assert without(out) == without(ref) and out.choice == ref.choice


@needs_models
def test_branches_of_a_beam_are_no_draws_and_its_steps_count_once(runs):
    out = diagnose_run(runs["beam"])
    assert out.choice is None and out.missing == {
        "choice": "solutions of beam are no independent draws: diagnose a run of majority or best_of_n"
    }
    assert out.steps == sum(node["score"] is not None for record in read_run(runs["beam"]) for node in record["nodes"])
    assert out.good_steps + out.first_errors < out.steps and out.step_scores.auc.value is not None


@needs_models
def test_problems_that_failed_are_left_out_and_counted(runs, tmp_path):
    records = list(read_run(runs["best_of_n"]))
    records[0] |= {"error": "too long", "nodes": [], "branches": [], "aggregates": {}, "ledger": None}
    (tmp_path / "run.json").write_bytes((runs["best_of_n"] / "run.json").read_bytes())
    (tmp_path / PROBLEMS).write_text("".join(json.dumps(record) + "\n" for record in records))
    out = diagnose_run(tmp_path)
    assert (out.problems, out.subject.failed) == (NUM_PROBLEMS - 1, 1)
    (tmp_path / PROBLEMS).write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(RunError, match="holds no finished problem"):
        diagnose_run(tmp_path)


@needs_models
def test_a_task_without_programs_has_answers_but_no_step_labels(runs, tmp_path):
    description = json.loads((runs["best_of_n"] / "run.json").read_text())
    description["task"] |= {"name": "math500", "split": "test"}
    (tmp_path / "run.json").write_text(json.dumps(description))
    (tmp_path / PROBLEMS).write_bytes((runs["best_of_n"] / PROBLEMS).read_bytes())
    out, ref = diagnose_run(tmp_path), diagnose_run(runs["best_of_n"])
    assert set(out.missing) == {"step_scores", "agreement", "first_error"} and out.subject.labels is None
    assert (out.answers, out.choice) == (ref.answers, ref.choice)


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2.5-math-prm", "math-shepherd", "rlhflow", "skywork", "value-head"])
def test_every_family_reads_a_file(tmp_path, kind):
    """And alone as among others: solutions of one problem share what they share and no more."""
    random_prm_directory(tmp_path / kind, kind, seed=1)
    scorer = load_scorer(tmp_path / kind, EngineConfig(deterministic=True, kv_bytes=4 << 20))
    rng, samples = random.Random(2), []
    for number in range(4):
        program = draw_program(2, rng)
        for other in range(2):
            steps = solve(program, rng)
            samples.append(Sample(id=f"{number}-{other}", problem=program.text, steps=tuple(steps), label=-1 if other else 1,
                                  final_answer_correct=bool(other)))  # fmt: skip
    out = diagnose_samples(samples, source="file", scorer=scorer, prm=kind)
    assert (out.problems, out.solutions, out.first_errors) == (4, 8, 4) and out.first_error.correct == 4
    lengths = [len(scorer.spec.step(text, i == 0)) for sample in samples for i, text in enumerate(sample.steps)]
    assert (out.length.bins[0].low, out.length.bins[-1].high) == (min(lengths), max(lengths))
    alone = [diagnose_samples([sample], source="file", scorer=scorer, prm=kind) for sample in samples]
    assert sum(one.steps for one in alone) == out.steps
    assert sum(one.first_error.accuracy_correct.value or 0 for one in alone) / 4 == out.first_error.accuracy_correct.value
    wrong = next(one for one, sample in zip(alone, samples, strict=True) if sample.label == 1)
    assert wrong.good_steps == 1 and wrong.step_scores.count == 2 and wrong.agreement.forgiven.value is not None


def test_a_solution_that_the_prm_cannot_read_is_left_out(tmp_path):
    random_prm_directory(tmp_path / "prm", "value-head")
    scorer = load_scorer(tmp_path / "prm", EngineConfig(kv_bytes=4 << 20))
    short = Sample(id="1", problem="a=1+1;a?", steps=("a=1+1=2",), label=-1)
    long = Sample(id="2", problem="b=1+1;b?", steps=("b=1+1=2" * 400,), label=0)
    out = diagnose_samples([short, long], source="file", scorer=scorer, prm="prm")
    assert (out.problems, out.subject.failed) == (1, 1)
    with pytest.raises(EngineError, match="positions"):
        diagnose_samples([long], source="file", scorer=scorer, prm="prm")


GOOD = {"id": "a", "problem": "1+1?", "steps": ["So 2.", "Yes."], "label": 1, "final_answer_correct": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no solutions"),
        ("\n \n", "holds no solutions"),
        ("[]", "holds no solutions"),
        ("[1", "is not JSON"),
        ("{'id': 1}", "line 1 is not JSON"),
        ("[1]", "entry 1 is 1, not an object"),
        (GOOD | {"label": 2}, "line 1: its label 2 is none of its 2 steps, counted from 0, nor -1"),
        (GOOD | {"label": -2}, "line 1: its label -2 is none"),
        (GOOD | {"label": 0.5}, "line 1.label is 0.5, not a whole number"),
        (GOOD | {"label": True}, "line 1.label is true, not a whole number"),
        (GOOD | {"steps": []}, "line 1: it has no steps"),
        (GOOD | {"steps": "So 2."}, 'line 1.steps is "So 2.", not a list'),
        (GOOD | {"steps": ["So", 2]}, "line 1.steps[1] is 2, not a text"),
        (GOOD | {"problem": "  "}, "line 1: its problem is blank"),
        (GOOD | {"steps": ["\ud800", "b"]}, "line 1: its text holds half a surrogate pair"),
        (GOOD | {"final_answer_correct": "yes"}, 'line 1.final_answer_correct is "yes", not true or false'),
        (json.dumps(GOOD).replace("true", "NaN"), "line 1 is not JSON: NaN is not JSON"),
        ({name: value for name, value in GOOD.items() if name != "label"}, "line 1 lacks label"),
        ({name: value for name, value in GOOD.items() if name != "steps"}, "line 1 lacks steps"),
        (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD), "line 3: its id 'a' is that of line 1"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path, text, words):
    file = tmp_path / "samples.jsonl"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(TaskError) as refused:
        read_processbench(file)
    assert words in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_file_has_besides_is_not_read(tmp_path):
    more = GOOD | {"id": "b", "final_answer_correct": None, "generator": ["anything"]}
    out = read_processbench(written(tmp_path / "samples.jsonl", [GOOD, more]))
    assert [sample.id for sample in out] == ["a", "b"] and out[1].final_answer_correct is None
    assert out[0] == Sample(id="a", problem="1+1?", steps=("So 2.", "Yes."), label=1, final_answer_correct=True)


@pytest.mark.parametrize(("make", "words"), [(lambda f: None, "No such file"), (lambda f: f.mkdir(), "directory"),
                                             (lambda f: f.write_bytes(b"\xff"), "not UTF-8")])  # fmt: skip
def test_a_file_that_cannot_be_read(tmp_path, make, words):
    make(tmp_path / "x")
    for read, error in ((read_processbench, TaskError), (read_diagnostics, RunError)):
        with pytest.raises(error, match=words):
            read(tmp_path / "x")


# --- the record -----------------------------------------------------------------------------------------------------------


@needs_models
def test_the_record_is_read_back_as_it_was_written(runs, tmp_path):
    ref, file = diagnose_run(runs["beam"], threshold=0.3), tmp_path / "diagnostics.json"
    save_diagnostics(ref, file)
    assert read_diagnostics(file) == ref and "NaN" not in file.read_text()
    told = json.loads(file.read_text())
    for changed, words in ((told | {"odd": 1}, "has the key 'odd'"), (told | {"schema_version": 9}, "schema_version 9"),
                           (told | {"steps": "many"}, ".steps is \"many\", not a whole number")):  # fmt: skip
        file.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=words):
            read_diagnostics(file)
