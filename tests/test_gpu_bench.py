"""bench/gpu.py where there is no GPU: every part once, tiny, on the CPU and in the interpreter; its frame when things go wrong."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for the folder of benches, which no installation has

from bench import gpu  # noqa: E402
from bench.baselines.cascade import Cascade  # noqa: E402
from bench.device import figures, setting, worker  # noqa: E402
from bench.device.parts import PARTS  # noqa: E402
from bench.device.plans import Case  # noqa: E402
from bench.device.trees import beam, planted, random_grove  # noqa: E402

FIGURES = {  # that a part tells
    "attention": {"blind", "sharing", "bandwidth", "unrelated"},
    "levels": {"cascade"},
    "tick": {"tick"},
    "prm": {"reread", "head", "prefill"},
    "search": {"search", "overlap"},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_runs_to_its_end(name, tmp_path):
    told = []
    assert worker.run({name: 600.0}, "cpu", "tiny", tmp_path, told.append) == 0
    begin, *found, end = told
    assert (begin["event"], end["event"], end["error"]) == ("begin", "end", None), end
    kinds = [event["event"] for event in found]
    assert "failed check" not in kinds and ("row" in kinds) == (name not in ("tiles-bf16", "tiles-fp16"))
    figures = [event for event in found if event["event"] == "figure"]
    assert {figure["name"] for figure in figures} == FIGURES.get(name, set())
    assert all(math.isfinite(figure["value"]) for figure in figures)
    json.dumps(told)


def test_every_figure_of_the_table_is_told_by_a_part():
    assert set().union(*FIGURES.values()) == set(figures.FIGURES)


# --- what is measured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [8, 17, 19])
def test_the_tree_that_figures_are_of_is_read_five_times(levels):
    tree = replace(setting.FULL.tree, levels=levels)
    grove = beam(tree)
    assert all(len(grove.path(row)) == levels for row in range(tree.branches))
    assert 4.5 < grove.logical / grove.distinct < 5.5
    assert grove.logical / tree.branches == pytest.approx(tree.prompt + tree.shared + tree.private, rel=0.05)
    slots = [slot for run in grove.runs for slot in run.tolist()]
    assert len(set(slots)) == len(slots) and max(slots) < grove.num_slots


@pytest.mark.parametrize("shape", [(3, 1, 16), (7, 1, 32)])
def test_level_by_level_is_attention(shape, bench_of):
    grove = beam(setting.Tree(branches=7, prompt=20, shared=30, private=70, levels=4))
    case = Case(bench_of(), grove, shape, torch.float32)
    paths = [grove.path(row) for row in range(len(grove.rows))]
    cascade = Cascade(paths, grove.runs, *shape, torch.float32, torch.device("cpu"))
    for _ in range(2):  # what one run leaves behind is nothing to the next
        case.judged(cascade.run(case.q, case.cache.k[0], case.cache.v[0]))


def test_what_is_wrong_is_found(bench_of):
    case = Case(bench_of(), random_grove(3, 5, 9), (3, 1, 16), torch.float32)
    exact = case.grove.exact(case.q, case.cache.k[0], case.cache.v[0])
    case.judged(exact.float())
    for spoilt in (exact.float() * (1 + 1e-4), exact.float().index_fill(0, torch.tensor([0]), torch.nan), exact.float() * 0):
        with pytest.raises(AssertionError):
            case.judged(spoilt)


def test_a_failed_check_fails_its_part_and_none_of_the_others(bench_of):
    told = []
    bench = bench_of(told.append)
    bench.check("bad", lambda: 1 / 0)
    bench.check("good", lambda: {"error": 0.5})
    with pytest.raises(setting.Wrong, match="1 of 2 checks failed: bad"):
        bench.settle()
    assert [event["event"] for event in told] == ["failed check", "row"] and "ZeroDivisionError" in told[0]["error"]


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [("sharing", 4.0, "aim reached"), ("sharing", 2.5, "reached"), ("sharing", 2.4, "not reached"),
     ("tick", 1.2, "aim reached"), ("tick", 1.6, "reached"), ("tick", 1.7, "not reached")],
)  # fmt: skip
def test_verdicts(name, value, verdict):
    assert figures.FIGURES[name].verdict(value) == verdict


@pytest.fixture
def bench_of(tmp_path):
    """told -> a tiny bench on the CPU."""
    return lambda told=lambda event: None: setting.Bench("cpu", setting.TINY, tmp_path, told)


def test_rows_alone_are_rows_of_the_tree():
    grove = planted([-1, 0, 0, 1], [5, 3, 4, 2], [3, 2], [1, 2], seed=1)
    alone = grove.only(0)
    assert [run.tolist() for run in alone.runs] == [grove.runs[node].tolist() for node in (0, 1, 3)]
    assert alone.distinct == 10 and grove.distinct == 14 and grove.logical == 19
    assert grove.before(1).lens == [5, 3, 3, 1]


# --- the frame --------------------------------------------------------------------------------------------------------------

# Stands in for a worker: what a part does hangs on its name.
STAND_IN = """
import json, os, sys, time
settings = json.loads(sys.argv[1])
with os.fdopen(settings["events"], "w") as events:
    def told(event):
        events.write(json.dumps(event) + "\\n")
        events.flush()
    for part in settings["parts"]:
        told({"event": "begin", "part": part})
        if part == "levels":
            print("last words")
            events.flush()
            os._exit(7)
        if part == "replay":
            time.sleep(60)
        told({"event": "row", "part": part, "case": "a case", "ms": 0.5})
        if part == "attention":
            told({"event": "figure", "part": part, "name": "sharing", "case": "wide", "value": 3.1, "noise": 0.02})
        error = "Traceback: of the part" if part == "prm" else None
        told({"event": "end", "part": part, "seconds": 0.1, "error": error})
        if part == "prm":
            sys.exit(3)
"""


@pytest.fixture
def frame(tmp_path, monkeypatch):
    """argv -> (exit status, JSON that was written or None), workers stood in for and a device that nvidia-smi tells of."""
    script, tools = tmp_path / "stand_in.py", tmp_path / "tools"
    script.write_text(STAND_IN)
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 40, 300.00 W'\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for name, value in {"COMMAND": [sys.executable, str(script)], "RESULTS": tmp_path, "GRACE": 0.0}.items():
        monkeypatch.setattr(gpu, name, value)
    short = {name: replace(part, seconds=4.0) for name, part in PARTS.items()}
    monkeypatch.setattr(gpu, "PARTS", short)

    def run(*argv):
        status = gpu.main(argv)
        files = list(tmp_path.glob("*.json"))
        return status, {path.name: json.loads(path.read_text()) for path in files}

    return run


def test_parts_that_hang_die_or_fail_cost_the_others_nothing(frame, capsys):
    status, files = frame()
    assert status == 1
    [(name, found)] = files.items()
    assert name == "h200-all.json" and found["machine"]["gpu"] == "NVIDIA H200" and found["machine"]["driver"] == "580.1"
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0] or found["machine"]["torch"] == torch.__version__
    assert list(found["parts"]) and set(found["parts"]) == set(PARTS)
    errors = {part: outcome["error"] for part, outcome in found["parts"].items() if outcome["error"] is not None}
    assert set(errors) == {"levels", "replay", "prm"}
    assert "status 7" in errors["levels"] and "last words" in errors["levels"]
    assert "out of time" in errors["replay"] and errors["prm"] == "Traceback: of the part"
    assert {row["part"] for row in found["rows"]} == set(PARTS) - {"levels", "replay"}
    assert found["parts"]["search"]["clocks"] == [["NVIDIA H200", "580.1", "1980 MHz", "3201 MHz", "40", "300.00 W"]] * 2
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == 6 and "failed part: prm" in shown  # each as it came, and in the table
    assert [line.split()[-1] for line in shown.splitlines() if "wide" in line][-1] == "reached"


def test_chosen_parts_pass(frame):
    status, files = frame("attention", "kernels")
    assert status == 0 and set(files["h200-attention-kernels.json"]["parts"]) == {"kernels", "attention"}


def test_what_makes_no_sense_is_refused_in_a_sentence(capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        gpu.main(["nonsense"])
    assert left.value.code == 2 and "no part nonsense; known: tiles-bf16" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "asked", lambda: None)
    assert gpu.main([]) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


def test_kernels_have_their_name_where_nothing_is_installed():
    bare = (
        "from bench.device import worker; worker.util.find_spec = lambda name: None; worker.name_kernels()\n"
        "from tts_kernels import merge; print(merge.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(ROOT / "kernels" / "merge.py"), done.stderr
