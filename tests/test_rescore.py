"""Stored trees read by another PRM: the scores, votes and costs that a fresh run has, and a source that nobody touched."""

import json
from dataclasses import asdict, replace

import pytest

from tts_engine import embedded
from tts_engine.config import EngineConfig
from tts_engine.embedded import model_path
from tts_engine.engine import Engine
from tts_engine.errors import EngineError, OutOfBlocks, RunError
from tts_engine.rescore import config_of, describe_rescoring, load_scorer, read_tree, rescore
from tts_engine.runs import PROBLEMS, RUN, Run, describe_model, describe_run, evaluate, read_description, read_run
from tts_engine.score import read_trees, score
from tts_engine.search import make_method
from tts_engine.tasks.grader import Grader
from tts_engine.tasks.problems import load_task
from tts_engine.testing import check_blocks, random_policy_directory, random_prm_directory

SETTINGS = {"block_size": 4, "max_step_tokens": 12, "max_rows": 8, "kv_bytes": 4 << 20, "deterministic": True}
PRMS = ("math-shepherd", "qwen2.5-math-prm")
NUM_PROBLEMS = 3


def method_of(name, **settings):
    return make_method(name, **{"n": 4, "max_steps": 4} | settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    for kind in PRMS:
        random_prm_directory(directory / kind, kind, seed=2)
    return directory


@pytest.fixture(scope="module")
def fresh(models, tmp_path_factory):
    """(method, PRM) -> the directory of a fresh run; made once."""
    made = {}

    def run(method, kind="math-shepherd"):
        if (method, kind) not in made:
            directory = made[method, kind] = tmp_path_factory.mktemp("run")
            search(models / "policy", models / kind, method, directory, SETTINGS)
        return made[method, kind]

    return run


def search(policy, prm, method, directory, settings):
    problems = load_task("embedded", "calibration", NUM_PROBLEMS)
    description = describe_run(policy=policy, prm=prm if method.uses_prm else None, config=EngineConfig(**settings), method=method,
                               seed=1, task="embedded", split="calibration", limit=NUM_PROBLEMS, problems=problems)  # fmt: skip
    with Engine.from_pretrained(policy, prm, **settings) as engine, Run(directory, description) as run:
        for problem in problems:  # one after the other, so that none pays for another's evictions
            evaluate(engine, [problem], method, run, seed=1, finished=lambda record: None)


def read_by(prm, source, out, **changed):
    """Rescore a whole run; the records by id."""
    config = config_of(source, **changed)
    with Run(out, describe_rescoring(source, prm, config)) as run:
        rescore(read_trees(source), load_scorer(prm, config), run, finished=lambda record: None)
    return by_id(out)


def by_id(directory):
    return {record["id"]: record for record in read_run(directory)}


def essence(record, *but):
    return {key: value for key, value in record.items() if key not in ("ledger", "seconds", *but)}


def unpadded(record):
    """What the PRM cost but for the rows that filled its batches up, which were other batches."""
    return {key: value for key, value in record["ledger"]["prm"].items() if key not in ("padding_flops", "flops")}


def scores(record):
    return [node["score"] for node in record["nodes"]]


# --- exact ----------------------------------------------------------------------------------------------------------------

METHODS = [method_of("best_of_n"), method_of("beam", width=2), method_of("beam", width=2, rules="sal"), method_of("dvts", width=2),
           method_of("rebase")]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", PRMS)
def test_the_prm_that_made_a_run_reads_the_same_bits_out_of_it_for_the_same_cost(models, fresh, tmp_path, method, kind):
    source = fresh(method, kind)
    ref, out = by_id(source), read_by(models / kind, source, tmp_path / "out")
    assert out.keys() == ref.keys() and len(out) == NUM_PROBLEMS
    for name in ref:
        assert essence(out[name]) == essence(ref[name])
        assert len(set(scores(out[name]))) > 3
        assert out[name]["ledger"]["policy"] == ref[name]["ledger"]["policy"]
        assert unpadded(out[name]) == unpadded(ref[name])  # every shared prefix once, and nothing twice


@pytest.mark.skipif(not (embedded.MODELS / "prm-good").is_dir(), reason="needs the embedded models: tts-engine embedded train")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["best_of_n", "beam", "dvts"])
def test_runs_of_the_models_that_ship_are_read_as_they_were_made(tmp_path, name, deterministic):
    method, settings = make_method(name, n=4), {"block_size": 8, "deterministic": deterministic}
    search(model_path("policy-s"), model_path("prm-good"), method, tmp_path / "run", settings)
    ref, out = by_id(tmp_path / "run"), read_by(model_path("prm-good"), tmp_path / "run", tmp_path / "out")
    for problem in ref:
        assert scores(out[problem]) == pytest.approx(scores(ref[problem]), abs=0 if deterministic else 1e-5)
        assert essence(out[problem], "nodes") == essence(ref[problem], "nodes") and len(ref[problem]["aggregates"]) == 7


def test_best_of_n_read_by_another_prm_is_best_of_n_with_that_prm(models, fresh, tmp_path):
    source, method = fresh(METHODS[0]), METHODS[0]
    ref, out = by_id(fresh(method, PRMS[1])), read_by(models / PRMS[1], source, tmp_path / "out")
    for name in ref:
        assert essence(out[name]) == essence(ref[name]) and scores(out[name]) != scores(by_id(source)[name])


def test_a_majority_read_by_a_prm_is_best_of_n_but_for_its_name(models, fresh, tmp_path):
    source = fresh(method_of("majority"))
    assert not any(score for record in by_id(source).values() for score in scores(record))
    ref, out = by_id(fresh(METHODS[0])), read_by(models / PRMS[0], source, tmp_path / "out")
    for name in ref:
        assert essence(out[name], "method") == essence(ref[name], "method")
        assert len(out[name]["aggregates"]) == 7


def test_steps_that_the_search_dropped_unread_are_read_too_and_the_others_as_before(models, tmp_path):
    method = method_of("beam", n=8, width=2, rules="reference")
    search(models / "policy", models / PRMS[0], method, tmp_path / "run", SETTINGS | {"max_step_tokens": 3})
    ref, out = by_id(tmp_path / "run"), read_by(models / PRMS[0], tmp_path / "run", tmp_path / "out")
    dropped = 0
    for name in ref:
        assert None not in scores(out[name])
        dropped += scores(ref[name]).count(None)
        assert all(old in (None, new) for old, new in zip(scores(ref[name]), scores(out[name]), strict=True))
        assert essence(out[name], "nodes") == essence(ref[name], "nodes")
    assert dropped > 0


def test_a_budget_of_little_more_than_one_branch_changes_no_bit(models, fresh, tmp_path):
    source = fresh(METHODS[1])
    scorer = load_scorer(models / PRMS[0], config_of(source, kv_bytes=26_000))
    recomputed = 0
    for stored in read_trees(source):
        steps, ledger = read_tree(stored, scorer)
        assert [steps[node.identity].score for node in stored.nodes] == [node.score for node in stored.nodes]
        recomputed += ledger.prm.tokens_recomputed
        counts = check_blocks(scorer.runner.tree)
        assert counts.pinned == counts.filling == 0 and scorer.num_open == 0
    assert recomputed > 0


# --- on the disk ----------------------------------------------------------------------------------------------------------


def test_the_source_is_left_alone_and_the_new_run_says_whose_trees_it_holds(models, fresh, tmp_path):
    source = fresh(METHODS[0])
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    read_by(models / PRMS[1], source, tmp_path / "out")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    made, new = read_description(source), read_description(tmp_path / "out")
    assert new["prm"] == describe_model(models / PRMS[1]) and new["prm"] != made["prm"]
    assert new["rescores"]["name"] == source.name and new["rescores"]["prm"] == made["prm"]
    assert new["rescores"]["problems"] == NUM_PROBLEMS and set(new["rescores"]["sha256"]) == {RUN, PROBLEMS}
    for key in ("task", "method", "seed", "policy"):
        assert new[key] == made[key]
    with Grader() as grader:
        assert score(tmp_path / "out", grader).changed == []
    again = read_by(models / PRMS[0], tmp_path / "out", tmp_path / "back")  # a rescoring is a run like any other
    assert [essence(record) for record in again.values()] == [essence(record) for record in by_id(source).values()]


def test_a_torn_rescoring_goes_on_where_it_stopped(models, fresh, tmp_path):
    source, out = fresh(METHODS[1]), tmp_path / "out"
    ref = read_by(models / PRMS[1], source, out)
    content = (out / PROBLEMS).read_bytes()
    first = content.index(b"\n") + 1
    (out / PROBLEMS).write_bytes(content[: first + 100])
    again = read_by(models / PRMS[1], source, out)
    assert (out / PROBLEMS).read_bytes()[:first] == content[:first]
    assert {name: essence(record) for name, record in again.items()} == {name: essence(record) for name, record in ref.items()}
    whole = (out / PROBLEMS).read_bytes()
    read_by(models / PRMS[1], source, out)
    assert (out / PROBLEMS).read_bytes() == whole


def test_another_prm_another_source_and_other_settings_are_refused_by_name(models, fresh, tmp_path):
    source, out = fresh(METHODS[0]), tmp_path / "out"
    read_by(models / PRMS[0], source, out)
    grown = tmp_path / "grown"
    grown.mkdir()
    (grown / RUN).write_bytes((source / RUN).read_bytes())
    (grown / PROBLEMS).write_bytes((source / PROBLEMS).read_bytes().partition(b"\n")[0] + b"\n")
    for prm, directory, changed, words in [
        (PRMS[1], source, {}, "prm.architecture="),
        (PRMS[0], source, {"block_size": 8}, "was made with block_size=4, not block_size=8"),
        (PRMS[0], grown, {}, f"was made with rescores.problems={NUM_PROBLEMS} and rescores.sha256.{PROBLEMS}="),
    ]:
        with pytest.raises(RunError) as refusal:
            read_by(models / prm, directory, out, **changed)
        assert words in str(refusal.value) and "choose another --out" in str(refusal.value)
    with pytest.raises(RunError, match="rescores"):
        read_by(models / PRMS[0], source, source)


def test_the_settings_of_the_run_hold_but_for_the_family_and_what_is_given(fresh, tmp_path):
    source = fresh(METHODS[0])
    assert config_of(source) == EngineConfig(**SETTINGS)
    assert config_of(source, kv_bytes=1 << 20, prm_family="math-shepherd") == EngineConfig(
        **SETTINGS | {"kv_bytes": 1 << 20, "prm_family": "math-shepherd"}
    )
    description = read_description(source)
    untaken = "engine settings that this version cannot take"
    for engine, words in [
        (None, untaken),
        ({"warp": 9}, "'warp'"),
        ({"block_size": "4"}, untaken),
        ({"dtype": "int3"}, "no dtype"),
    ]:
        (tmp_path / RUN).write_text(json.dumps(description | {"engine": engine}))
        with pytest.raises(EngineError, match=words):
            config_of(tmp_path)
    config = EngineConfig(**SETTINGS | {"prm_family": "math-shepherd"})
    (tmp_path / RUN).write_text(json.dumps(description | {"engine": asdict(config)}))
    assert config_of(tmp_path) == replace(config, prm_family=None)


# --- what cannot be read --------------------------------------------------------------------------------------------------


def with_records(source, directory, *records):
    directory.mkdir()
    (directory / RUN).write_bytes((source / RUN).read_bytes())
    (directory / PROBLEMS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_a_failed_problem_stays_failed_and_one_too_long_for_the_prm_fails_after_the_others(models, fresh, tmp_path):
    first, second, third = by_id(fresh(METHODS[0])).values()
    failed = first | {"error": "a prompt of 9999 tokens", "answer": None, "correct": False, "aggregates": {}, "branches": [],
                      "nodes": [], "prompt_tokens": [], "ledger": None}  # fmt: skip
    long = second | {"nodes": [node | {"text": node["text"] + "1+" * 200} for node in second["nodes"]]}
    source = with_records(fresh(METHODS[0]), tmp_path / "source", failed, long, third)
    out = read_by(models / PRMS[0], source, tmp_path / "out", kv_bytes=60_000)
    assert list(out) == [failed["id"], third["id"], long["id"]]
    assert essence(out[failed["id"]]) == essence(failed)
    assert essence(out[third["id"]]) == essence(third)
    bad = out[long["id"]]
    assert bad["error"] and "\n" not in bad["error"] and bad["correct"] is False
    assert bad["nodes"] == [] and bad["gold"] == long["gold"]
    with Grader() as grader:
        assert score(tmp_path / "out", grader).changed == []


def test_where_the_prm_can_read_no_tree_that_is_an_error_of_the_settings(models, fresh, tmp_path):
    with pytest.raises(OutOfBlocks, match="raise kv_bytes"):
        read_by(models / PRMS[0], fresh(METHODS[0]), tmp_path / "out", kv_bytes=3000)
    assert (tmp_path / "out" / PROBLEMS).read_bytes() == b""
    with pytest.raises(EngineError, match="kv_bytes=10 holds no block of 4 tokens: one takes"):
        load_scorer(models / PRMS[0], config_of(fresh(METHODS[0]), kv_bytes=10))


def test_a_run_without_a_finished_problem_is_refused(models, fresh, tmp_path):
    source = with_records(fresh(METHODS[0]), tmp_path / "source")
    with pytest.raises(RunError, match="holds no finished problem yet"):
        describe_rescoring(source, models / PRMS[0], config_of(source))


def test_a_model_that_is_no_prm_is_refused(models, fresh):
    with pytest.raises(EngineError, match="PRM"):
        load_scorer(models / "policy", config_of(fresh(METHODS[0])))
