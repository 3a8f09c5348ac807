"""The command line: one verb a subcommand, a table for people, and with --json one last line for programs.

Whatever a user can mend is one sentence and exit code 2. What takes torch is imported by the verbs that need it, so that help
is quick.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from .embedded import BLOCK_SIZE, NAMES, model_path
from .errors import EngineError
from .options import (
    ADAPTIVE_OPTIONS,
    AUTO,
    BENCH_DEPTH,
    BUDGET,
    ENGINE_OPTIONS,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    METHOD,
    NO_PRM,
    NOT_FOR_BENCH,
    PRM,
    READING_OPTIONS,
    Run,
    is_text,
    make_parser,
    one_line,
)
from .search import METHODS, Method, make_method
from .tasks.problems import find_task


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(RUNS).parse_args(argv)
    try:
        return int(args.run(args))
    except EngineError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        print(one_line(f"error: {error.filename or 'a file'} cannot be used: {error.strerror or error}"), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_USAGE


# --- verbs ----------------------------------------------------------------------------------------------------------------


def run_solve(args: argparse.Namespace) -> int:
    method, policy, prm, settings = chosen_search(args)
    from .engine import Engine
    from .report.solution import solution
    from .report.tree import tree
    from .runs import describe_result

    if not is_text(args.problem):
        raise EngineError("the problem is not UTF-8")
    with Engine.from_pretrained(policy, prm, **settings) as engine:
        [result] = engine.search(args.problem, method, seed=args.seed)
        screen = console()
        if args.tree:
            screen.print(tree(result), "")
        screen.print(solution(result))
        if result.choice is not None:
            screen.print(f"method: {result.method.name} n={result.method.n}, {choice_words(result.choice)}", markup=False)
        if args.budget is not None:
            screen.print(budget_words(args.budget, result.ledger), markup=False)
        if args.json:
            print(json.dumps(describe_result(result, engine.grader)))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    task = find_task(args.task)
    problems = task.load(args.split)
    method, policy, prm, settings = chosen_search(args, task.name, problems[: args.limit])
    from .config import EngineConfig
    from .engine import Engine
    from .models.weights import resolve_checkpoint
    from .report.progress import Progress
    from .report.table import aggregate_rows, cell_of, table
    from .runs import Run, describe_run, evaluate

    config = EngineConfig(**settings)
    directories = [resolve_checkpoint(model, config.load) for model in (policy, prm) if model is not None]
    description = describe_run(
        policy=directories[0], prm=directories[1] if prm is not None else None, config=config, method=method,
        seed=args.seed, task=task.name, split=args.split, limit=args.limit, problems=problems,
    )  # fmt: skip
    problems = problems[: args.limit]
    with Run(args.out, description) as run:
        if len(run.done) < len(problems):
            try:
                with Engine.from_pretrained(*directories, **settings) as engine, Progress(len(problems)) as progress:
                    progress.begin(method.name, run.records)
                    evaluate(engine, problems, method, run, seed=args.seed, finished=progress.advance)
            except KeyboardInterrupt:
                print(f"interrupted: {len(run.done)} of {len(problems)} problems are safe in {args.out}; run the same command "
                      "again to continue", file=sys.stderr)  # fmt: skip
                return EXIT_INTERRUPTED
        cell = cell_of(run.records, Path(args.policy).name, method.uses_prm)
        failed = [record["id"] for record in run.records if record["error"]]
        screen = console()
        screen.print(table([cell], f"{task.name}, {args.split}: {len(problems)} problems", screen.width))
        for row in aggregate_rows(run.records):
            screen.print(row, markup=False)
        if args.budget is not None:
            screen.print(budget_words(args.budget, cell.ledger), markup=False)
        screen.print(f"in {args.out}", markup=False, highlight=False)
        if args.method == AUTO and method.table.was_fitted_on(description["task"]):
            print("the strategy was fitted on these problems: what it gains on them is in part luck", file=sys.stderr)
        if failed:
            print(f"{len(failed)} problems could not be searched and count as not solved, {failed[0]} among them; "
                  f"their records say why", file=sys.stderr)  # fmt: skip
        if args.json:
            print(json.dumps(cell.as_dict() | {"failed": len(failed), "out": str(args.out)}))
    return EXIT_FAILED if failed else 0


def run_fit(args: argparse.Namespace) -> int:
    from .report.strategy_table import confusion_table, pick_table
    from .runs import describe_making
    from .strategy.choose import fit

    if args.out.is_dir():
        raise EngineError(f"--out {args.out} is a directory, not a file")
    runs = [evidence(directory) for directory in args.run_directories]
    pilots = [evidence(directory, draws=True) for directory in args.pilot]
    edges = {} if args.edges is None else {"edges": args.edges}
    strategy = fit(runs, pilots, name=args.out.stem, versions=describe_making()["versions"], kind=args.bins, draws=args.draws,
                   quantiles=args.quantiles, budgets=args.budgets, **edges)  # fmt: skip
    strategy.save(args.out)
    screen = console()
    for table in strategy.tables:
        screen.print(pick_table(asdict(table)))
        if table.predictor is not None:
            screen.print(confusion_table(asdict(table)))
    screen.print(f"in {args.out}", markup=False, highlight=False)
    if args.json:
        print(json.dumps({"out": str(args.out), "strategy": asdict(strategy)}))
    return 0


def run_sweep(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from .report.progress import Progress
    from .report.table import table
    from .sweep.make import Sweep
    from .sweep.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    if args.dry_run:
        return show_estimate(args, recipe)
    if args.configs is not None:
        raise EngineError("--configs is for --dry-run")
    out = args.out or Path("runs") / args.recipe.stem
    check_device(recipe.config.device)
    try:
        with Sweep(recipe, out) as sweep, Progress(len(sweep.cells) * len(sweep.problems)) as progress:
            made = sweep.make(progress)
    except KeyboardInterrupt:
        print(f"interrupted: what is finished is safe in {out}; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    screen = console()
    screen.print(table([one.outcome for one in made], f"{args.recipe}: {len(sweep.problems)} problems", screen.width))
    screen.print(f"in {out}", markup=False, highlight=False)
    failed = sum(len(one.failed) for one in made)
    if failed:
        print(f"{failed} times a problem could not be searched and counts as not solved; the records say why", file=sys.stderr)
    if args.json:
        print(json.dumps({"out": str(out), "cells": [one.as_dict() for one in made], "failed": failed}))
    return EXIT_FAILED if failed else 0


def run_score(args: argparse.Namespace) -> int:
    from .score import score
    from .tasks.grader import Grader

    with Grader() as grader:
        scored = score(args.run_directory, grader, args.grouping)
    screen = console()
    show_choices(screen, scored.records, f"{args.run_directory}: {len(scored.records)} problems")
    if scored.changed:
        screen.print(f"{len(scored.changed)} problems come out otherwise than their records say, {scored.changed[0]} among them",
                     markup=False)  # fmt: skip
    else:
        screen.print("all as their records say")
    if args.json:
        print(json.dumps(choices(scored.records) | {"changed": scored.changed}))
    return 0


def run_rescore(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from .models.weights import resolve_checkpoint
    from .report.progress import Progress
    from .rescore import config_of, describe_rescoring, load_scorer, rescore
    from .runs import Run
    from .score import read_trees

    source = args.run_directory
    given = {name: getattr(args, name) for name in READING_OPTIONS}
    config = config_of(source, **{name: value for name, value in given.items() if value is not None})
    check_device(config.device)
    prm = resolve_checkpoint(local_directory(args.prm) or args.prm, config.load)
    name = Path(args.prm).resolve().name
    out = args.out or source.resolve().with_name(f"{source.resolve().name}-by-{name}")
    if out.resolve() == source.resolve():
        raise EngineError(f"--out {out} is the run itself, which is not changed: choose another --out")
    description = describe_rescoring(source, prm, config)
    count = description["rescores"]["problems"]  # a run that is being written may grow meanwhile

    def trees() -> Iterator[Any]:
        return islice(read_trees(source), count)

    for _ in trees():  # none is read, nor --out made, before all are found sound
        pass
    with Run(out, description) as run:
        if len(run.done) < count:
            try:
                with Progress(count) as progress:
                    progress.begin(name, run.records)
                    rescore(trees(), load_scorer(prm, config), run, finished=progress.advance)
            except KeyboardInterrupt:
                print(f"interrupted: {len(run.done)} of {count} problems are safe in {out}; run the same command again to "
                      "continue", file=sys.stderr)  # fmt: skip
                return EXIT_INTERRUPTED
        failed = [record["id"] for record in run.records if record["error"]]
        screen = console()
        show_choices(screen, run.records, f"{source} as {name} reads it: {count} problems")
        screen.print(f"in {out}", markup=False, highlight=False)
        if failed:
            print(f"{len(failed)} problems could not be searched or read and count as not solved, {failed[0]} among them; their "
                  "records say why", file=sys.stderr)  # fmt: skip
        if args.json:
            print(json.dumps(choices(run.records) | {"out": str(out)}))
    return EXIT_FAILED if failed else 0


def run_diagnose(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from .diagnose import diagnose_by, diagnose_run, save_diagnostics
    from .report.diagnostics import FILE
    from .report.diagnostics_table import diagnostics_table

    source, out = args.source, args.out
    given = {name: value for name in READING_OPTIONS if (value := getattr(args, name)) is not None}
    if out is not None and out.is_dir():
        raise EngineError(f"--out {out} is a directory, not a file")
    if args.prm is not None:
        from .config import EngineConfig
        from .rescore import config_of

        blocks = {"block_size": BLOCK_SIZE} if args.prm in NAMES else {}
        config = config_of(source, **given) if source.is_dir() else EngineConfig(**blocks | given)
        check_device(config.device)
        found = diagnose_by(local_directory(args.prm) or args.prm, source, config, threshold=args.threshold)
    elif given:
        raise EngineError(f"--{next(iter(given)).replace('_', '-')} is for a PRM that reads now: give --prm")
    elif source.is_file():
        raise EngineError(f"{source} is no run and holds no scores: give --prm, which then reads its solutions")
    else:
        found = diagnose_run(source, threshold=args.threshold)
        out = out or source / FILE
    screen = console()
    screen.print(diagnostics_table(found))
    if out is not None:
        save_diagnostics(found, out)
        screen.print(f"in {out}", markup=False, highlight=False)
    if args.json:
        print(json.dumps(asdict(found) | {"out": str(out) if out is not None else None}))
    return 0


def run_report(args: argparse.Namespace) -> int:
    from .gather import diagnosed, gather
    from .report.comparison import as_dict
    from .report.diagnostics_table import diagnostics_table
    from .report.page import make_report, write_report
    from .report.sheets import SPARED, show

    out = args.out or Path("runs") / time.strftime("report-%Y%m%d-%H%M%S")
    study = gather(args.directories, args.difficulty)
    report = make_report(study, diagnosed(args.directories, args.diagnostics))
    screen = console()
    for sheet in report.sheets:
        if sheet.name not in SPARED:
            show(sheet, screen)
    for found in report.diagnostics:
        screen.print("", diagnostics_table(found))
    file = write_report(report, out)
    for note in study.notes:
        print(one_line(note), file=sys.stderr)
    screen.print(f"\nin {file}", markup=False, highlight=False, soft_wrap=True)
    if args.json:
        print(json.dumps(as_dict(study) | {"out": str(out)}))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from .models.convert import convert

    done = convert(args.source, args.destination)
    print(f"{done.tensors} tensors, {done.num_bytes} bytes, in {done.files} files in {args.destination}")
    if args.json:
        print(json.dumps(asdict(done) | {"out": str(args.destination)}))
    return 0


def run_info(args: argparse.Namespace) -> int:
    from .report import info

    asked = [name for name in (args.policy, args.prm) if name is not None]
    named = asked or [name for name in NAMES if model_path(name).is_dir()]
    if args.memory is not None and not asked:
        raise EngineError("--memory is for models that are named: give --policy, --prm or both")
    models = [info.model(name, local_directory(name) or (Path(name) if Path(name).is_file() else None)) for name in named]
    room = info.room(models, args.memory) if asked else None
    installation = info.installation()
    screen = console()
    screen.print(info.installation_table(installation))
    if models:
        screen.print(info.model_table(models))
    if room is not None:
        screen.print(info.room_table(room))
    if args.json:
        print(json.dumps({"installation": installation, "models": models, "room": room}))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from .bench import measure
    from .report import bench_table

    if args.out is not None:
        bench_table.refuse_unless_known(args.out)
    cases = chosen_cases(args)
    measured = measure(cases, repeats=args.repeats)
    if args.out is not None:
        bench_table.refuse_unless_writable(args.out)
    rows, interrupted = list[dict[str, Any]](), False
    try:
        for one in measured:
            rows.append(one.as_dict())
            if args.out is not None:
                bench_table.write(rows, args.out)
            if len(rows) < len(cases):
                print(f"{len(rows)} of {len(cases)} measured", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted: {len(rows)} of {len(cases)} are measured", file=sys.stderr)
    finally:
        if rows:
            bench_table.show(rows, console())
    if args.json:
        print(json.dumps({"interrupted": interrupted, "rows": rows, "out": str(args.out) if args.out is not None else None}))
    return EXIT_INTERRUPTED if interrupted else 0


def run_demo(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from . import demo
    from .errors import MissingExtra
    from .report.plot import plot_accuracy
    from .report.progress import Progress
    from .report.table import table

    out = args.out or demo.default_directory()
    try:
        with Progress(args.problems * sum(len(methods) for *_, methods in demo.LINE_UP)) as progress:
            cells = demo.run_demo(args.problems, out, progress)
    except KeyboardInterrupt:
        print(f"interrupted: what is finished is safe; continue with --problems {args.problems} --out {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    verdict = demo.verdict(cells)
    screen = console()
    screen.print(table(cells, f"{args.problems} problems of the embedded task's test split", screen.width))
    screen.print(verdict.sentence, markup=False, highlight=False)
    plot: Path | None = out / "accuracy.png"
    try:
        plot_accuracy(cells, out / "accuracy.png", f"{args.problems} test problems of the embedded task")
    except MissingExtra as missing:
        plot = None
        print(missing, file=sys.stderr)
    screen.print(f"\nruns: {out}" + (f"\nplot: {plot}" if plot else ""), markup=False, highlight=False, soft_wrap=True)
    if args.json:
        print(json.dumps({"problems": args.problems, "cells": [cell.as_dict() for cell in cells], "verdict": verdict.as_dict(),
                          "out": str(out), "plot": str(plot) if plot else None}))  # fmt: skip
    return 0


def run_embedded_train(args: argparse.Namespace) -> int:
    from .embedded.train import train_all

    train_all(args.out, args.work)
    return 0


def run_embedded_check(args: argparse.Namespace) -> int:
    from .embedded.check import check

    figures = check(args.problems)
    if args.json:
        print(json.dumps({name: {"value": figure.value, "error": figure.error} for name, figure in figures.items()}))
    return 0


RUNS: dict[str, Run] = {
    "solve": run_solve,
    "eval": run_eval,
    "fit": run_fit,
    "sweep": run_sweep,
    "score": run_score,
    "rescore": run_rescore,
    "diagnose": run_diagnose,
    "report": run_report,
    "convert": run_convert,
    "info": run_info,
    "bench": run_bench,
    "demo": run_demo,
    "embedded train": run_embedded_train,
    "embedded check": run_embedded_check,
}


# --- what verbs share -----------------------------------------------------------------------------------------------------


def chosen_method(args: argparse.Namespace) -> Method:
    """The method with the settings that were given; the budget has a default, for the methods that have a budget."""
    own = ("n", "width", "rules", "temperature", "max_steps", *(name for name, *_ in ADAPTIVE_OPTIONS))
    named = {name: getattr(args, name) for name in own}
    settings = {name: value for name, value in named.items() if value is not None}
    if "n" in {field.name for field in fields(METHODS[args.method])}:
        settings.setdefault("n", BUDGET)
    return make_method(args.method, **settings)


def chosen_search(args: argparse.Namespace, task: str | None = None, problems: Sequence[Any] = ()) -> tuple[Any, Any, Any, dict]:
    """The method or the chooser of one, and what chosen_engine gives, of options checked as far as they can be."""
    difficulty = getattr(args, "difficulty", None)
    if args.method != AUTO:
        for name, value in {"strategy": args.strategy, "difficulty": difficulty}.items():
            if value is not None:
                raise EngineError(f"--{name} is for --method {AUTO}")
        method = chosen_method(args)
        return method, *chosen_engine(args, method)
    if args.strategy is None:
        raise EngineError(f"--method {AUTO} needs --strategy: a file that fit wrote, or paper_table")
    for name in ("width", "rules", "temperature", "max_steps", *(name for name, *_ in ADAPTIVE_OPTIONS)):
        if getattr(args, name) is not None:
            raise EngineError(f"{AUTO} has no setting {name!r}: the strategy has it")
    from .strategy.auto import Auto, table_for
    from .strategy.choose import load_strategy

    strategy = load_strategy(args.strategy)
    policy, prm, settings = chosen_engine(args, None)
    load = settings.get("load", "weights")
    table = table_for(strategy, policy=policy, prm=prm, task=task, load=load)
    known = {} if difficulty is None else known_bins(difficulty, table.bins, policy, load, args.seed, problems)
    auto = Auto(strategy=strategy, table=table, n=BUDGET if args.n is None else args.n, known=known)
    return auto, policy, prm if auto.uses_prm else None, settings


def known_bins(source: Path, bins: Any, policy: str | Path, load: str, seed: int, problems: Sequence[Any]) -> dict[str, str]:
    """How hard each problem is for this policy, by the draws of a run with another seed."""
    from .models.weights import resolve_checkpoint
    from .runs import describe_model
    from .strategy.difficulty import refuse_as_pilot, refuse_shared_draws

    told = evidence(source, draws=True)
    refuse_as_pilot(told.description, told.name)
    model = describe_model(resolve_checkpoint(policy, load), load)
    if told.policy != model["sha256"]:
        raise EngineError(f"{source} is a run of {told.description['policy']['name']} and not of this policy, for which other "
                          "problems are hard")  # fmt: skip
    refuse_shared_draws(told.description, told.name, {"policy": model, "seed": seed}, "this run")
    known = {id: bins.of(draws.pass_rate) for id, draws in told.draws.items() if draws is not None}
    if missing := [problem.id for problem in problems if problem.id not in known]:
        raise EngineError(f"{source} does not tell how hard {len(missing)} of the problems are, {missing[0]} among them")
    return {problem.id: known[problem.id] for problem in problems}


def evidence(directory: Path, *, draws: bool = False) -> Any:
    """A run on the disk as what a strategy is fitted to: outcomes, or a pilot's draws. Raises RunError or StrategyError."""
    from .runs import read_description
    from .score import read_trees
    from .strategy.choose import Evidence, outcome_of
    from .strategy.difficulty import read_draws
    from .tasks.grader import Grader

    description = read_description(directory)
    found = Evidence(str(directory), description)
    with Grader() as grader:
        for stored in read_trees(directory):
            record = stored.record
            if draws:
                found.draws[record["id"]] = read_draws(record, grader)
            else:
                found.outcomes[record["id"]] = outcome_of(record)
    found.check()
    return found


def chosen_engine(args: argparse.Namespace, method: Method | None) -> tuple[str | Path, str | Path | None, dict[str, Any]]:
    """Policy, PRM (none where the method reads none; None: yet to be chosen) and EngineConfig's settings, of options checked as far
    as they can be."""
    given = {name: getattr(args, name) for name, *_ in ENGINE_OPTIONS}
    settings = {name: value for name, value in given.items() if value is not None}
    ships = args.policy in NAMES
    if ships:
        settings.setdefault("block_size", BLOCK_SIZE)
    prm = args.prm if args.prm is not None or not ships else PRM
    if method is not None and method.uses_prm and prm is None:
        raise EngineError(f"{method.name} needs a PRM: give --prm")
    if not is_text(args.system or ""):
        raise EngineError("the system message is not UTF-8")
    set_threads(args.threads)
    check_device(settings.get("device", "cpu"))
    models = [local_directory(name) or name if name is not None else None for name in (args.policy, prm)]
    policy = models[0]
    assert policy is not None
    return policy, models[1] if method is None or method.uses_prm else None, settings


def chosen_cases(args: argparse.Namespace) -> list[Any]:
    """The cases of a bench, of options checked as far as they can be without a model."""
    from .bench import cross

    def given(names: Sequence[str]) -> dict[str, Any]:
        values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        return {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}

    of_engine = given([name for name, *_ in ENGINE_OPTIONS if name not in NOT_FOR_BENCH])
    methods = args.method or (METHOD,)
    of_method = given(["rules", "width"]) | {"max_steps": args.depth or (BENCH_DEPTH,)} | given(["n"])
    if any(field.name == "n" for name in methods if name in METHODS for field in fields(METHODS[name])):
        of_method.setdefault("n", (BUDGET,))
    for device in of_engine.get("device", ()):
        check_device(device)
    cases: list[Any] = []
    for policy in args.policy:
        ships = policy in NAMES
        prms = args.prm or (PRM if ships else NO_PRM,)
        models = [(local_directory(policy) or policy, None if prm == NO_PRM else local_directory(prm) or prm) for prm in prms]
        blocks = {"block_size": (BLOCK_SIZE,)} if ships else {}
        cases += cross(models, of_engine=blocks | of_engine, methods=methods,
                       of_case=given(["problems", "prompt_tokens", "step_tokens", "seed"]), of_method=of_method)  # fmt: skip
    return list(dict.fromkeys(cases))


def show_choices(screen: Any, records: Sequence[dict[str, Any]], title: str) -> None:
    """Each way of choosing among a run's branches, and the share of problems it solves."""
    from .report.table import aggregate_rows

    screen.print(title, markup=False, highlight=False)
    for row in aggregate_rows(records):
        screen.print(row, markup=False)


def show_estimate(args: argparse.Namespace, recipe: Any) -> int:
    """What a sweep would cost; what could not be had is told on standard error."""
    from .report.cost_table import cost_tables
    from .report.text import figures
    from .sweep.estimate import assumptions, estimate

    found = estimate(recipe, args.configs)
    screen = console()
    told = found.as_dict()
    for drawn in cost_tables(told["cells"]):
        screen.print(drawn)
    hours = figures(sum(cost["hours"] for cost in told["cells"]))
    screen.print(f"{args.recipe}: {len(told['cells'])} cells, {hours} hours; {assumptions(recipe.estimate)}", markup=False)
    for sentence in found.missing:
        print(one_line(sentence), file=sys.stderr)
    if args.json:
        print(json.dumps(told))
    return EXIT_FAILED if found.missing else 0


def choice_words(choice: dict[str, Any]) -> str:
    """How a strategy came to the method."""
    if choice["bin"] is None:
        return f"which {choice['strategy']} has for all problems"
    chance = f" (chance {100 * choice['chances'][choice['bin']]:.0f} %)" if "chances" in choice else ""
    return f"which {choice['strategy']} has for {choice['bin']} problems; {choice['by']} to be one{chance}"


def budget_words(text: str, ledger: Any) -> str:
    """What became of a budget."""
    from .search.allocation import executed, read_budget

    budget = read_budget(text)
    return f"budget: {executed(budget, ledger):.3g} of {budget.amount:.3g} {budget.unit}, the first draws of every problem among it"


def choices(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same for JSON: of how many problems, how many each way solves."""
    from .report.table import shared_aggregates

    names = shared_aggregates(records)
    solved = {name: sum(bool(record["aggregates"].get(name, {}).get("correct")) for record in records) for name in names}
    failed = sum(record["error"] is not None for record in records)
    return {"problems": len(records), "failed": failed, "correct": sum(bool(r["correct"]) for r in records), "aggregates": solved}


def local_directory(name: str) -> Path | None:
    """Where a model of this name lies: with the package, or wherever the user says; None for a hub id."""
    if name in NAMES:
        return model_path(name)
    return Path(name) if Path(name).is_dir() else None


def check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    named = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device)
    if named is None:
        raise EngineError(f"no device {device!r}; known: cpu, cuda, cuda:INDEX")
    if int(named[1] or 0) >= torch.cuda.device_count():
        raise EngineError(f"--device {device}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def console() -> Any:
    """Standard output; at least wide enough for our tables where it is no terminal."""
    from rich.console import Console

    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=max(screen.width, 132))
