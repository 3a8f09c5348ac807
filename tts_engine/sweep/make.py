"""The cells of a sweep, made one after another; and what their costs mean.

A searched cell begins with nothing in the cache. So what it executes and how long that takes is what it would be alone, whatever
ran before it and wherever a sweep was broken off. Each of them therefore reads the prompts anew: some hundred tokens a problem,
where a search draws thousands. What is worth sharing, the draws, is shared by not being searched a second time.

A cell that was replayed or rescored has the answers, scores and tree of a search of its own. Its ledger is that of the ideal
executor, which wastes nothing. It has no clock; `seconds` are 0. `Ledger.flops` of a searched cell holds beside that what its
executor wasted: rows that fill up a batch, what was read, drawn or computed again, or drawn ahead. Hence:

- `Ledger.asked_flops`, policy and PRM by the ideal executor, follows from the tree alone. It is the cost to compare cells by,
  searched or not.
- `Ledger.flops`, and every time, say what this machine did, and are compared among searched cells only.

Where a cell cannot be made from another without a difference, for a problem with a draw that the PRM has no room for, that problem
is searched; its record lacks "made". A problem that its source could not search, it could not either.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..embedded import NAMES, model_path
from ..engine import Engine
from ..errors import EngineError, RunError
from ..ledger import Phases
from ..models.weights import resolve_checkpoint
from ..report import table
from ..report.progress import Progress
from ..rescore import read_tree
from ..results import Chooser, SearchResult
from ..runs import (
    Run,
    Told,
    describe_failure,
    describe_making,
    describe_method,
    describe_model,
    describe_records,
    describe_result,
    describe_run,
    evaluate,
    read_run,
    refuse_unless_same,
    write_description,
)
from ..score import Stored, read_trees
from ..search import Method
from ..search.best_of_n import Majority
from ..strategy.auto import Auto, table_for
from ..strategy.choose import Strategy, Table, load_strategy
from ..strategy.difficulty import read_draws
from ..strategy.replay import replay
from ..tasks.grader import Grader
from ..tasks.problems import Problem, find_task
from . import RUNS, SCHEMA_VERSION, SWEEP, is_sweep, read_sweep_description
from .plan import REPLAYED, Cell, plan
from .recipe import AutoEntry, Recipe


@dataclass(frozen=True, slots=True)
class Made:
    """A finished cell: where its run lies, and what it came to."""

    cell: Cell
    directory: Path
    outcome: table.Cell
    failed: tuple[str, ...]  # ids of problems that could not be searched

    def as_dict(self) -> dict[str, Any]:
        asked = self.outcome.ledger.asked_flops
        return self.outcome.as_dict() | self.cell.as_dict() | {"asked_flops": asked, "failed": len(self.failed)}


class Sweep:
    """A recipe with its problems and models at hand, and the directory that it fills; `make` goes on where it stopped.

    Use it as a context manager, or `close` it. Raises EngineError for a task or model that cannot be had, RunError where the
    directory is that of another sweep.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory, self.config = recipe, Path(directory), recipe.config
        self.cells = plan(recipe)
        self._task = find_task(recipe.task)
        problems = self._task.load(recipe.split)
        self.problems = problems[: recipe.limit]
        load = self.config.load
        self._models = {name: resolve_checkpoint(named(name), load) for name in (*recipe.policies, *recipe.prms)}
        self._described = {name: describe_model(path, load) for name, path in self._models.items()}
        for cell in self.cells:
            if isinstance(cell.method, AutoEntry):  # what is wrong with a strategy is said before hours have passed
                strategy, served = self._table(cell)
                if recipe.pilot is None:
                    Auto(strategy=strategy, table=served, n=cell.method.n, known={})
        self._run = describe_run(
            policy=self._models[recipe.policies[0]], prm=None, config=self.config, method=Majority(n=1), seed=recipe.seed,
            task=self._task.name, split=recipe.split, limit=recipe.limit, problems=problems,
        )  # fmt: skip
        self._sources = dict[str, dict[str, Any]]()  # what is said of a cell that others are made from
        self._engine: Engine | None = None
        self._loaded: tuple[str, str | None] | None = None
        description = json.loads(json.dumps(self._describe()))  # as it will be read
        if is_sweep(self.directory):
            made = read_sweep_description(self.directory) | {"cells": description["cells"]}  # they follow from the rest
            refuse_unless_same(self.directory, made, description)
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_description(self.directory / SWEEP, description)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{self.directory} cannot be used as a sweep's directory: {reason}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine, if one was loaded."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._loaded = None, None

    def make(self, progress: Progress) -> list[Made]:
        """Every cell, told in the recipe's order; those that are whole already are only read.

        Raises RunError where a run is damaged or another process writes it; and once the other cells are made EngineError, naming
        the cell, where none of a cell's problems fits.
        """
        made = list[Made]()
        failed = dict[str | None, EngineError]()
        for cell in self.cells:
            if cell.source in failed:
                failed[cell.name] = failed[cell.source]
                continue
            method = self._method(cell)
            directory = self.directory / cell.directory
            with Run(directory, self._describe_cell(cell, method)) as run:
                progress.begin(cell.name, run.records)
                if len(run.done) < len(self.problems):
                    try:
                        self._fill(cell, method, run, progress.advance)
                    except RunError:
                        raise
                    except EngineError as error:
                        failed[cell.name] = error
                        continue
                label = Path(cell.policy).name + (f", {Path(cell.prm).name}" if cell.prm is not None else "")
                unsearched = tuple(record["id"] for record in run.records if record["error"])
                made.append(Made(cell, directory, table.cell_of(run.records, label, _reads(method)), unsearched))
        if failed:
            name, reason = next(iter(failed.items()))
            others = f"; {len(failed) - 1} more of {len(self.cells)} cells could not be made" if len(failed) > 1 else ""
            raise EngineError(f"{name}: {reason}{others}") from reason
        policies, prms = self.recipe.policies, (None, *self.recipe.prms)
        methods = list(dict.fromkeys(method.name for policy in policies for method in self.recipe.entries_of(policy)))
        return sorted(made, key=lambda one: (policies.index(one.cell.policy), not one.cell.pilot, prms.index(one.cell.prm),
                                             (methods + ["majority"]).index(one.cell.method.name), one.cell.method.n))  # fmt: skip

    def _fill(self, cell: Cell, method: Method | Chooser, run: Run, finished: Told) -> None:
        engine = self._engine_for(cell)
        rest: Sequence[Problem] = self.problems
        if cell.source is not None:
            assert not isinstance(method, Chooser), "what is chosen problem by problem is searched"
            make_from(read_trees(self._source(cell)), self.problems, method, run, finished, cell, engine)
            rest = [problem for problem in self.problems if problem.id not in run.done]
        engine.forget()
        if rest:
            evaluate(engine, rest, method, run, seed=cell.seed, finished=finished)

    def _engine_for(self, cell: Cell) -> Engine:
        """That of the cell before where it will do."""
        if self._engine is not None and self._loaded is not None:
            policy, prm = self._loaded
            if policy == cell.policy and cell.prm in (None, prm):
                return self._engine
        self.close()
        prm = cell.prm if cell.prm is not None or not self.recipe.prms else self.recipe.prms[0]
        directories = [self._models[name] for name in (cell.policy, prm) if name is not None]
        self._engine, self._loaded = Engine.from_pretrained(*directories, **asdict(self.config)), (cell.policy, prm)
        return self._engine

    def _method(self, cell: Cell) -> Method | Chooser:
        if not isinstance(cell.method, AutoEntry):
            return cell.method
        strategy, served = self._table(cell)
        known = self._told_by_pilot(cell, served) if served.predictor is None and self.recipe.pilot is not None else {}
        return Auto(strategy=strategy, table=served, n=cell.method.n, known=known)

    def _table(self, cell: Cell) -> tuple[Strategy, Table]:
        """The strategy of an auto cell, and its table for the cell's models."""
        assert isinstance(cell.method, AutoEntry)
        strategy = load_strategy(cell.method.strategy)
        prm = named(cell.prm) if cell.prm is not None else None
        served = table_for(strategy, policy=named(cell.policy), prm=prm, task=self._task.name, load=self.config.load)
        return strategy, served

    def _told_by_pilot(self, cell: Cell, served: Table) -> dict[str, str]:
        """The bin of each problem; one that the pilot could not search is among the hardest."""
        [pilot] = [other for other in self.cells if other.pilot and other.policy == cell.policy]
        known = {}
        with Grader() as grader:
            for record in read_run(self.directory / pilot.directory):
                draws = read_draws(record, grader)
                known[record["id"]] = served.bins.names[-1] if draws is None else served.bins.of(draws.pass_rate)
        return known

    def _describe(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": {name: value for name, value in asdict(self.recipe).items() if name != "estimate"},  # no run hangs on it
            "task": self._run["task"],
            "engine": asdict(self.config),
            "policies": {name: self._described[name] for name in self.recipe.policies},
            "prms": {name: self._described[name] for name in self.recipe.prms},
            "cells": [cell.as_dict() for cell in self.cells],
        } | describe_making()

    def _describe_cell(self, cell: Cell, method: Method | Chooser) -> dict[str, Any]:
        prm = self._described[cell.prm] if cell.prm is not None and _reads(method) else None
        own = {"method": describe_method(method), "seed": cell.seed, "policy": self._described[cell.policy], "prm": prm}
        if cell.source is None:
            return self._run | own
        if cell.source not in self._sources:
            self._sources[cell.source] = {"name": cell.source} | describe_records(self._source(cell))
        return self._run | own | {"derived": {"made": cell.made} | self._sources[cell.source]}

    def _source(self, cell: Cell) -> Path:
        return self.directory / RUNS / str(cell.source)


def _reads(method: Method | Chooser) -> bool:
    """Whether a PRM may take part."""
    return any(one.uses_prm for one in (method.methods if isinstance(method, Chooser) else (method,)))


def named(name: str) -> str | Path:
    """A model as an engine takes it: those that ship by their directory."""
    return model_path(name) if name in NAMES else name


def make_from(
    trees: Iterable[Stored], problems: Sequence[Problem], method: Method, run: Run, finished: Told, cell: Cell, engine: Engine
) -> None:  # fmt: skip
    """Put into `run` what follows from the trees of the cell's source. What is left out has to be searched."""
    known, done = {problem.id: problem for problem in problems}, run.done
    for tree in trees:
        problem = known.get(tree.record["id"])
        if problem is None or problem.id in done:
            continue
        record = _record(tree, problem, method, cell, engine)
        if record is not None:
            record |= {"made": cell.made, "seconds": 0.0}
            run.append(record)
            finished(record)


def _record(tree: Stored, problem: Problem, method: Method, cell: Cell, engine: Engine) -> dict[str, Any] | None:
    if tree.record["error"] is not None:
        return describe_failure(problem, method, cell.seed, EngineError(tree.record["error"]))
    if cell.made == REPLAYED:
        result: SearchResult | None = replay(problem, tree.nodes, tree.method, method, seed=cell.seed, engine=engine)
    else:
        try:
            most = engine.limits(problem, method).max_tokens
        except EngineError as error:
            return describe_failure(problem, method, cell.seed, error)
        result = rescored(tree, problem, method, most, seed=cell.seed, engine=engine)
    if result is None:
        return None
    made = describe_result(result, engine.grader)
    made["ledger"]["phases"] = asdict(Phases())  # grading it is no time of a search either
    return made


def rescored(tree: Stored, problem: Problem, method: Method, most: int, *, seed: int, engine: Engine) -> SearchResult | None:
    """The first draws of a majority as the best-of-N `method` that the engine's PRM makes of them.

    most: tokens after which best-of-N cuts a draw, so that the PRM has positions for it, as a majority would not. None where one of
    the draws is so long, or the PRM cannot read one: only a search tells what becomes of it.
    """
    assert engine.scorer is not None, "a cell with a PRM has an engine with one"
    draws = Majority(n=method.n, rules=method.rules, max_steps=method.max_steps)
    drawn = replay(problem, tree.nodes, tree.method, draws, seed=seed, engine=engine)
    if most < engine.limits(problem, draws).max_tokens and any(branch.num_tokens >= most for branch in drawn.branches):
        return None
    try:
        steps, _ = read_tree(Stored(tree.record, draws, drawn.nodes, drawn.branches), engine.scorer)
    except EngineError:
        return None
    return replay(problem, [steps[node.identity] for node in drawn.nodes], method, method, seed=seed, engine=engine)
