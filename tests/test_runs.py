"""A run on disk: what a kill may cost, what a second run may change, who may write."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from tts_engine import runs
from tts_engine.config import EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import OutOfBlocks, RunError
from tts_engine.ledger import PolicyLedger, PRMLedger
from tts_engine.report.table import cell_of
from tts_engine.runs import PROBLEMS, RUN, Run, describe_run, evaluate, read_run
from tts_engine.search import Adaptive, BeamSearch, Majority
from tts_engine.tasks.problems import Problem, load_task
from tts_engine.testing import random_policy_directory

ROOT = Path(__file__).resolve().parents[1]
METHOD = BeamSearch(n=4, width=2, max_steps=5)
SETTINGS = {"block_size": 8, "max_step_tokens": 12, "max_rows": 8, "kv_bytes": 4 << 20, "deterministic": True}
NUM_PROBLEMS = 24

# Evaluates in a process of its own and says so when it is done.
CHILD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_runs import run_all
run_all(*map(Path, sys.argv[1:]))
print("done")
"""


def problems():
    return load_task("embedded", "calibration", NUM_PROBLEMS)


def describe(models, **changed):
    settings = {"method": METHOD, "seed": 0, "task": "embedded", "split": "calibration", "limit": NUM_PROBLEMS}
    config = EngineConfig(**SETTINGS | changed.pop("engine", {}))
    return describe_run(policy=models / "policy", prm=models / "prm", config=config, problems=problems(), **settings | changed)


def run_all(models, directory):
    with (
        Run(directory, describe(models)) as run,
        Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS) as engine,
    ):
        evaluate(engine, problems(), METHOD, run, seed=0, finished=lambda record: None)


def without_costs(record):
    """What must not depend on kills: everything but clocks and what happened to be in the cache."""
    return {key: value for key, value in record.items() if key not in ("ledger", "seconds")}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run that nobody disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_all(models, directory)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in (RUN, PROBLEMS):
        (directory / name).write_bytes((whole / name).read_bytes())
    return directory


def test_a_record_holds_every_node_and_leads_back_to_the_text(whole):
    records = list(read_run(whole))
    assert sorted(record["id"] for record in records) == [problem.id for problem in problems()]
    for record in records:
        assert record["schema_version"] == 1 and record["error"] is None and record["correct"] in (True, False)
        assert record["method"] == {"name": "beam", **asdict(METHOD)} and record["seed"] == 0
        assert len(record["aggregates"]) == 7 and record["prompt_tokens"]
        for i, node in enumerate(record["nodes"]):
            assert set(node) == {"parent", "tokens", "text", "score", "finish", "identity", "lane", "draw"}
            assert -1 <= node["parent"] < i and node["tokens"] and 0 <= node["score"] <= 1
        assert len({node["identity"] for node in record["nodes"]}) == len(record["nodes"]) >= 4
        voted = [record["nodes"][branch["node"]] for branch in record["branches"]]
        assert voted and all(node["finish"] for node in voted)
        assert record["ledger"]["policy"]["tokens_generated"] == sum(len(node["tokens"]) for node in record["nodes"])
        assert record["seconds"] > 0


def test_a_finished_run_is_left_as_it_is(models, copy):
    before = (copy / PROBLEMS).read_bytes()
    run_all(models, copy)
    assert (copy / PROBLEMS).read_bytes() == before


def test_a_run_of_an_earlier_version_is_gone_on_with(models, copy):
    """Its ledgers lack what is counted now."""
    later = [field.name for part in (PolicyLedger, PRMLedger) for field in fields(part) if field.metadata]
    lines = [json.loads(line) for line in (copy / PROBLEMS).read_bytes().splitlines()]
    assert len(later) > 10 and all(name in lines[0]["ledger"]["policy"] | lines[0]["ledger"]["prm"] for name in later)
    for record in lines[1:]:
        del record["ledger"]["phases"]
        for part in ("policy", "prm"):
            record["ledger"][part] = {name: count for name, count in record["ledger"][part].items() if name not in later}
    (copy / PROBLEMS).write_bytes(b"".join(map(runs.as_line, lines)))
    with Run(copy, describe(models)) as run:
        assert len(run.records) == NUM_PROBLEMS
        cell = cell_of(run.records, "policy", uses_prm=True)
    assert cell.gflop > 0 and cell.ledger.useful is None and cell_of(lines[:1], "policy", uses_prm=True).ledger.useful > 0


def test_wherever_the_last_line_is_torn_it_is_cut_and_the_rest_kept(models, copy):
    content = (copy / PROBLEMS).read_bytes()
    lines = content.splitlines(keepends=True)
    last = len(content) - len(lines[-1])
    ids = [json.loads(line)["id"] for line in lines]
    description = describe(models)
    for torn in [1, 2, len(lines[-1]) // 2, len(lines[-1]) - 2, len(lines[-1]) - 1]:
        (copy / PROBLEMS).write_bytes(content[: last + torn])
        assert [record["id"] for record in read_run(copy)] == ids[:-1]
        with Run(copy, description) as run:
            assert run.done == set(ids[:-1])
        assert (copy / PROBLEMS).read_bytes() == content[:last]


def test_damage_before_the_last_line_is_named(models, copy):
    lines = (copy / PROBLEMS).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:50] + b"\n"
    (copy / PROBLEMS).write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=rf"{PROBLEMS} line 3 is damaged"):
        Run(copy, describe(models))


def test_killed_at_any_moment_and_run_again_nothing_is_lost_or_repeated(models, whole, tmp_path):
    directory, rng = tmp_path / "run", random.Random(0)
    kills = seen = 0
    while kills < 4:
        child = start(models, directory)
        goal = seen + rng.randrange(5)  # 0: as soon as it has opened the run
        while child.poll() is None and (not (directory / RUN).exists() or num_lines(directory) < goal):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        killed = child.wait() == -signal.SIGKILL
        now = len(list(read_run(directory)))
        assert now >= seen, "a finished problem is lost"
        seen = now
        if not killed:
            break
        kills += 1
    assert kills >= 2 and 0 < seen, "the kills came too early or too late to mean anything"
    child = start(models, directory)
    assert child.communicate(timeout=120)[0] == b"done\n"
    out = {record["id"]: without_costs(record) for record in read_run(directory)}
    ref = {record["id"]: without_costs(record) for record in read_run(whole)}
    assert num_lines(directory) == len(out) == NUM_PROBLEMS
    assert out == ref


def start(models, directory):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, models, directory], cwd=ROOT, stdout=subprocess.PIPE, env=environment)


def num_lines(directory):
    file = directory / PROBLEMS
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"method": BeamSearch(n=8, width=2, max_steps=5)}, "was made with n=4, not n=8; "),
        ({"method": Majority(n=4)}, "was made with method=beam and width=2 and max_steps=5, not method=majority and width=none"),
        ({"seed": 3}, "was made with seed=0, not seed=3; "),
        ({"limit": 5}, f"was made with limit={NUM_PROBLEMS}, not limit=5; "),
        ({"engine": {"top_k": 5, "block_size": 4}}, "was made with block_size=8 and top_k=0, not block_size=4 and top_k=5; "),
        ({"engine": {"deterministic": False}}, "was made with deterministic=True, not deterministic=False; "),
    ],
)
def test_other_settings_are_refused_by_name(models, copy, changed, sentence):
    with pytest.raises(RunError) as refusal:
        Run(copy, describe(models, **changed))
    assert sentence in str(refusal.value) and "choose another --out" in str(refusal.value)
    with Run(copy, describe(models)) as run:  # and the refusal has let go of it
        assert len(run.done) == NUM_PROBLEMS


def test_other_weights_and_other_problems_are_other_settings(models, copy, tmp_path):
    random_policy_directory(tmp_path / "policy", seed=1)
    with pytest.raises(RunError, match=r"policy\.sha256\.model\.safetensors=[0-9a-f]{12}\.\.\., not"):
        Run(copy, describe(models) | {"policy": runs.describe_model(tmp_path / "policy")})
    other = describe(models)
    other["task"]["problems_sha256"] = "0" * 64
    with pytest.raises(RunError, match="problems_sha256="):
        Run(copy, other)


def test_the_same_model_under_another_name_is_no_other_setting(models, copy, tmp_path):
    os.symlink(models / "policy", tmp_path / "elsewhere")
    with Run(copy, describe(models) | {"policy": runs.describe_model(tmp_path / "elsewhere")}) as run:
        assert run.done


def test_one_writer_at_a_time(models, copy):
    description = describe(models)
    with Run(copy, description):
        with pytest.raises(RunError, match="another process is writing"):
            Run(copy, description)
        assert len(list(read_run(copy))) == NUM_PROBLEMS  # reading is free
    Run(copy, description).close()


@pytest.mark.parametrize("fault", ["short", "full"])
def test_a_write_that_fails_leaves_the_run_as_it_was(models, copy, monkeypatch, fault):
    before = (copy / PROBLEMS).read_bytes()
    write = os.write

    def failing(file, data):
        if fault == "full":
            raise OSError(28, "No space left on device")
        return write(file, data[:10])

    with Run(copy, describe(models)) as run:
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(RunError, match=f"{NUM_PROBLEMS} problems are safe"):
            run.append({"id": "new", "problem": "x" * 100})
        monkeypatch.undo()
        assert (copy / PROBLEMS).read_bytes() == before
        run.append({"id": "new"})
    assert [record["id"] for record in read_run(copy)][-1] == "new"


def test_a_record_counts_once_it_is_written_even_where_ctrl_c_follows_at_once(models, copy, monkeypatch):
    def interrupted(file):
        raise KeyboardInterrupt

    with Run(copy, describe(models)) as run:
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.append({"id": "new"})
        monkeypatch.undo()
        assert "new" in run.done
        run.append({"id": "newer"})
    assert [record["id"] for record in read_run(copy)][-2:] == ["new", "newer"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda directory: (directory / RUN).unlink(), "without run.json"),
        (lambda directory: (directory / RUN).write_text("{"), "run.json cannot be read: not JSON"),
        (lambda directory: (directory / RUN).write_text("[]"), "is no description of a run"),
    ],
)
def test_a_directory_without_its_description_is_refused(models, copy, spoil, sentence):
    spoil(copy)
    with pytest.raises(RunError, match=sentence):
        Run(copy, describe(models))


def test_a_place_that_is_no_directory_is_refused(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used as a run's directory"):
        Run(tmp_path / "file" / "run", describe(models))
    with pytest.raises(RunError, match="cannot be read: No such file"):
        list(read_run(tmp_path / "nowhere"))


def test_a_shared_budget_is_divided_as_if_the_run_had_never_stopped(models, tmp_path):
    method = Adaptive(n=8, batch=2, budget="1000tokens", max_steps=2)
    described = describe(models, method=method)

    class Stop(Exception):
        pass

    def until(count):
        def finished(record):
            nonlocal count
            count -= 1
            if not count:
                raise Stop

        return finished

    with Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS) as engine:
        for name, stops in (("whole", [0]), ("stopped", [3, 0])):
            for stop in stops:
                with Run(tmp_path / name, described) as run:
                    try:
                        evaluate(engine, problems()[:8], method, run, seed=0, finished=until(stop))
                        assert not stop
                    except Stop:
                        assert stop and len(run.done) < 8
    whole, stopped = (sorted(read_run(tmp_path / name), key=lambda record: record["id"]) for name in ("whole", "stopped"))
    assert [without_costs(record) for record in whole] == [without_costs(record) for record in stopped]
    assert len({len(record["branches"]) for record in whole}) > 1


def test_a_problem_that_can_never_fit_is_recorded_and_the_rest_go_on(models, tmp_path):
    long = Problem("long", "a=" + "1+" * 300 + "1;a?", "1")
    few = [long, *problems()[:2]]
    told = []
    with (
        Run(tmp_path / "run", describe(models)) as run,
        Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS) as engine,
    ):
        evaluate(engine, few, METHOD, run, seed=0, finished=lambda record: told.append(record["id"]))
        with pytest.raises(OutOfBlocks):
            roomless = Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS | {"kv_bytes": 20_000})
            evaluate(roomless, problems()[3:], METHOD, run, seed=0, finished=lambda record: None)
    assert told[0] == "long" and sorted(told) == sorted(problem.id for problem in few)
    records = {record["id"]: record for record in read_run(tmp_path / "run")}
    assert "prompt of" in records["long"]["error"] and records["long"]["correct"] is False
    assert all(records[problem.id]["error"] is None for problem in few[1:])
