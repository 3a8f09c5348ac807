"""The study: does the best way to spend a test-time budget depend on policy, PRM and difficulty, and does it pay? One command,

    python bench/study/study.py [--quick] [-o DIR]

which goes on where it stopped. Three policies, two PRMs, all methods and budgets over the embedded task: sweeps of the calibration
and the test split, two at a time in a process and a thread each; a strategy fitted on the former, run on the latter; ten claims,
each with its number, its interval and a verdict. Runs lie in DIR; what is told of them in bench/results/study, of a quick study in
DIR/results. The models that do not ship must be there: python bench/study/models.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # for the folder of benches, which no installation has

from bench.study.claims import BUDGET, CHECKPOINTS, GOOD, LARGE, MIDDLE, POOR, REDO, SIZES, TINY, Side  # noqa: E402
from bench.study.telling import write_results  # noqa: E402
from tts_engine.cli import evidence  # noqa: E402
from tts_engine.errors import EngineError  # noqa: E402
from tts_engine.options import EXIT_INTERRUPTED, EXIT_USAGE  # noqa: E402
from tts_engine.report.text import clock  # noqa: E402

if TYPE_CHECKING:
    from tts_engine.report.arms import RunRead
    from tts_engine.report.diagnostics import Diagnostics

MODELS, RESULTS = HERE / "models", HERE.parent / "results" / "study"
LANES = 2
SEED, PILOT_SEED, PILOT_DRAWS = 0, 1, 36  # 4 of the pilot's draws stand for those of a search, 32 tell how hard a problem is
PROBLEMS, PROBE = 600, 12  # of a split; of those by which the time is told beforehand
AUTO_SHARE = 0.5  # of what a split takes: what the strategy's own searches take, about
BOUND = 0.05  # of adaptive stopping


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of everything; limit: problems of each split, None for all."""

    limit: int | None = None
    budgets: dict[str, list[int]] = field(default_factory=lambda: {policy: [4, 16, 64] for policy in SIZES} | {LARGE: [4, 16]})


QUICK = Scale(limit=24, budgets={policy: [4, 16] for policy in SIZES})


@dataclass(frozen=True, slots=True)
class Job:
    """A sweep to make: its directory's name and its recipe as plain data."""

    name: str
    recipe: dict[str, Any]


def jobs(scale: Scale) -> list[Job]:
    """All but the strategy's, the longest first."""
    found = []
    for policy in (MIDDLE, SIZES[0], LARGE):
        budgets = scale.budgets[policy]
        grid = [{"name": "cot"}, {"name": "majority", "n": [1, *budgets]},
                *({"name": name, "n": budgets} for name in ("best_of_n", "beam", "dvts"))]  # fmt: skip
        draws = [{"name": "best_of_n", "n": [BUDGET]}]
        for split in ("calibration", "test"):
            found.append(_job(f"{split}-main-{policy}", scale, split, [policy], [GOOD, POOR], grid))
        for split in ("calibration", "test") if policy == MIDDLE else ("test",):
            found.append(_job(f"{split}-others-{policy}", scale, split, [policy], [TINY, *CHECKPOINTS[:-1]], draws))
        pilot = [{"name": "best_of_n", "n": [PILOT_DRAWS]}]
        found.append(_job(f"calibration-pilot-{policy}", scale, "calibration", [policy], [GOOD, POOR], pilot, PILOT_SEED))
        pilot = [{"name": "majority", "n": [PILOT_DRAWS]}]
        found.append(_job(f"test-pilot-{policy}", scale, "test", [policy], [], pilot, PILOT_SEED))
        stops = [{"name": "adaptive", "n": budgets[-1:], "bound": BOUND}]
        found.append(_job(f"test-stopping-{policy}", scale, "test", [policy], [], stops))
    found += [_job(f"{split}-redo", scale, split, [REDO], [], [{"name": "cot"}]) for split in ("calibration", "test")]
    return found


def strategy_jobs(scale: Scale, strategy: Path) -> list[Job]:
    return [_job(f"test-auto-{policy}", scale, "test", [policy], [GOOD, POOR],
                 [{"name": "auto", "n": [1, *scale.budgets[policy]], "strategy": str(strategy)}])
            for policy in (MIDDLE, SIZES[0], LARGE)]  # fmt: skip


def _job(
    name: str, scale: Scale, split: str, policies: Sequence[str], prms: Sequence[str], methods: Sequence[dict[str, Any]],
    seed: int = SEED,
) -> Job:  # fmt: skip
    def located(model: str) -> str:
        return str(MODELS / model) if (MODELS / model).exists() else model

    recipe = {
        "task": "embedded", "split": split, "limit": scale.limit, "seed": seed, "policies": [*map(located, policies)],
        "prms": [*map(located, prms)], "methods": [*methods], "engine": {"block_size": 8},
    }  # fmt: skip
    return Job(name, recipe)


def make(job: Job, out: Path) -> tuple[str, float]:
    """One sweep; its name and the processor seconds it took. With one thread: small matrices gain more from a second process."""
    import torch

    from tts_engine.report.progress import Progress
    from tts_engine.sweep.make import Sweep
    from tts_engine.sweep.recipe import recipe_of

    torch.set_num_threads(1)
    with Sweep(recipe_of(job.recipe, job.name), out / job.name) as sweep:
        began = time.process_time()
        sweep.make(Progress(0))  # not entered, it only counts
        return job.name, time.process_time() - began


def make_all(jobs: Sequence[Job], out: Path, pool: ProcessPoolExecutor, *, quiet: bool = False) -> float:
    """The processor seconds that all sweeps took."""
    began, spent = time.monotonic(), 0.0
    for number, done in enumerate(as_completed([pool.submit(make, job, out) for job in jobs]), start=1):
        name, seconds = done.result()
        spent += seconds
        if not quiet:
            print(f"{clock(time.monotonic() - began)}: {name}, {number} of {len(jobs)} sweeps", flush=True)
    return spent


def expected(scale: Scale, out: Path, pool: ProcessPoolExecutor) -> float:
    """Seconds that the study takes on idle cores, about, by the same sweeps of PROBE problems. Few problems fill batches badly,
    so it takes less rather than more."""
    spent = make_all(jobs(replace(scale, limit=PROBE)), out / "probe", pool, quiet=True)
    return spent * PROBLEMS / PROBE * (1 + AUTO_SHARE / 2) / LANES


def fit_strategy(out: Path) -> Path:
    """On the calibration split, for every policy and PRM; written once."""
    from tts_engine.gather import read
    from tts_engine.runs import describe_making
    from tts_engine.strategy.choose import Evidence, fit, outcome_of

    def outcomes(run: Path) -> Evidence:
        found = read(run, {})
        return Evidence(found.name, found.description, {record["id"]: outcome_of(record) for record in found.records})

    file = out / "strategy.json"
    if not file.exists():
        runs = [outcomes(run) for policy in SIZES for run in runs_of(out / f"calibration-main-{policy}")]
        pilots = [evidence(run, draws=True)
                  for policy in SIZES for run in runs_of(out / f"calibration-pilot-{policy}", scored=True)]  # fmt: skip
        fit(runs, pilots, name="study", versions=describe_making()["versions"]).save(file)
    return file


def runs_of(sweep: Path, *, scored: bool = False) -> list[Path]:
    """Its run directories; scored: those that a PRM has read."""
    from tts_engine.sweep import read_sweep_description

    return [sweep / cell["directory"] for cell in read_sweep_description(sweep)["cells"] if cell["prm"] is not None or not scored]


def gather_side(out: Path, split: str) -> Side:
    """Every run of a split, with how hard its problems are for each policy."""
    from tts_engine.gather import bins_of, read
    from tts_engine.report.arms import study

    runs = [run for policy in SIZES for run in runs_of(out / f"{split}-main-{policy}")] + runs_of(out / f"{split}-redo")
    pilots = [run for policy in SIZES for run in runs_of(out / f"{split}-pilot-{policy}") if "majority" in run.name]
    if split == "test":
        for policy in SIZES:
            runs += runs_of(out / f"test-others-{policy}", scored=True)
            runs += [*runs_of(out / f"test-auto-{policy}"), *runs_of(out / f"test-stopping-{policy}")]
    texts: dict[str, str] = {}
    found = [as_asked(read(run, texts), run, out) for run in runs]
    models = [model for one in found for model in (one.description["policy"], one.description["prm"]) if model is not None]
    votes, most = {}, dict[tuple[str, str], int]()
    for one in found:
        method = one.description["method"]
        if method["name"] == "best_of_n":
            key = one.description["policy"]["name"], one.description["prm"]["name"]
            if method["n"] > most.get(key, 0):
                most[key], votes[key] = method["n"], votes_of(one.records)
    parameters = {model["name"]: model["parameters"] for model in models}
    return Side(study(found, texts, [bins_of(pilot, found) for pilot in pilots]), parameters, votes)


def as_asked(run: "RunRead", directory: Path, out: Path) -> "RunRead":
    """A run by its place in `out`; a strategy's with the PRM that the strategy is for, also where none of its methods reads it."""
    from tts_engine.sweep import read_sweep_description

    description = run.description
    if description["method"]["name"] == "auto":
        sweep = directory.parents[1]
        told = read_sweep_description(sweep)
        [cell] = [cell for cell in told["cells"] if sweep / cell["directory"] == directory]
        description = description | {"prm": told["prms"][cell["prm"]]}
    return replace(run, name=str(directory.relative_to(out)), description=description)


def votes_of(records: Sequence[dict[str, Any]]) -> dict[str, list[bool]]:
    """For each way of choosing among the draws, whether it solves each problem, in the order of their ids."""
    from tts_engine.report.table import shared_aggregates

    ordered = sorted(records, key=lambda record: record["id"])
    return {rule: [bool(record["aggregates"].get(rule, {}).get("correct")) for record in ordered]
            for rule in shared_aggregates(ordered)}  # fmt: skip


def diagnosed(out: Path) -> "dict[str, Diagnostics]":
    """Each PRM, by what it says of the middle policy's samples of calibration problems."""
    from tts_engine.diagnose import diagnose_run

    found = {}
    for sweep in ("calibration-main", "calibration-others"):
        for run in runs_of(out / f"{sweep}-{MIDDLE}", scored=True):
            if run.name.endswith(f"best_of_n-n{BUDGET}"):
                told = diagnose_run(run)
                found[told.subject.prm] = told
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few problems and small budgets: about 5 minutes, and no result")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="for the runs (default: runs/study, or runs/study-quick)")
    args = parser.parse_args()
    out = (args.out or Path("runs/study-quick" if args.quick else "runs/study")).resolve()
    if missing := [name for name in (REDO, TINY, *CHECKPOINTS[:-1]) if not (MODELS / name).is_dir()]:
        print(f"error: {MODELS} lacks {', '.join(missing)}: make them with python bench/study/models.py", file=sys.stderr)
        return EXIT_USAGE
    try:
        run_study(QUICK if args.quick else Scale(), out, out / "results" if args.quick else RESULTS)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"interrupted: what is done is safe in {out}; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run_study(scale: Scale, out: Path, results: Path) -> None:
    """All of it, or what is left of it."""
    began = time.monotonic()
    with ProcessPoolExecutor(LANES, mp_context=get_context("spawn")) as pool:
        if scale.limit is None:
            print(f"about {clock(expected(scale, out, pool))} on {LANES} idle cores", flush=True)
        make_all(jobs(scale), out, pool)
        make_all(strategy_jobs(scale, fit_strategy(out)), out, pool)
    calibration, test = (gather_side(out, split) for split in ("calibration", "test"))
    write_results(calibration, test, diagnosed(out), json.loads((out / "strategy.json").read_text()), results)
    print(f"{clock(time.monotonic() - began)}: results in {results}")


if __name__ == "__main__":
    sys.exit(main())
