"""`auto`: for each problem the method that a strategy has for problems so hard.

How hard a problem is is known, or predicted from a pilot: a few draws whose tokens count in the search's ledger. They are drawn
in lane (0, 0), which no method draws in, so they are nobody else's, and the method's own draws are those of a run without a pilot.
Where all bins have one method there is nothing to find out, and no pilot.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ..branch import Branch
from ..models.weights import SOURCES, resolve_checkpoint
from ..results import Choice, SearchResult
from ..search import Method
from ..search.requests import Join, Program
from ..search.rules import Rules
from ..tasks.problems import Problem
from . import StrategyError
from .choose import Model, Strategy, Table, load_strategy, method_of
from .difficulty import Draws
from .predictor import features, likeliest


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """Independent draws, in a lane of their own: that of a join within a join."""

    name: ClassVar[str] = "pilot"
    draws: Method

    @property
    def uses_prm(self) -> bool:
        return self.draws.uses_prm

    @property
    def vote(self) -> str:
        return self.draws.vote

    @property
    def n(self) -> int:
        return self.draws.n

    @property
    def rules(self) -> Rules:
        return self.draws.rules

    @property
    def max_steps(self) -> int:
        return self.draws.max_steps

    @property
    def temperature(self) -> float:
        return self.draws.temperature

    def program(self, root: Branch) -> Program:
        return _joined(_joined(self.draws.program(root)))


def _joined(program: Program) -> Program:
    [branches] = yield Join([program])
    return branches


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Stands where a method stands. known: bins of problems, by id, that need no prediction."""

    name: ClassVar[str] = "auto"
    strategy: Strategy
    table: Table
    n: int
    known: Mapping[str, str]

    def __post_init__(self) -> None:
        for problem, bin in self.known.items():
            if bin not in self.table.bins.names:
                raise StrategyError(f"problem {problem} is said to be {bin!r:.40}; the bins are {', '.join(self.table.bins.names)}")
        if not self._same and self.table.predictor is None and not self.known:
            raise StrategyError(f"the strategy {self.strategy.name} goes by how hard a problem is and predicts nothing: give a run "
                                "of the same problems with another seed")  # fmt: skip

    @property
    def uses_prm(self) -> bool:
        return any(method.uses_prm for method in self.methods)

    @property
    def methods(self) -> tuple[Method, ...]:
        chosen = tuple(dict.fromkeys(self.table.method(name, self.n) for name in self.table.bins.names))
        pilot = self._pilot
        return chosen if pilot is None else (pilot, *chosen)

    def pilot(self, problem: Problem) -> Method | None:
        if self._same or problem.id in self.known:
            return None
        if self._pilot is None:
            raise StrategyError(f"problem {problem.id} is not among those whose difficulty is known, and the strategy "
                                f"{self.strategy.name} predicts none")  # fmt: skip
        return self._pilot

    def choose(self, problem: Problem, pilot: SearchResult | None) -> Choice:
        names = self.table.bins.names
        why: dict[str, Any] = {"strategy": self.strategy.name, "n": self.n}
        if problem.id in self.known:
            bin = self.known[problem.id]
            why |= {"bin": bin, "by": "known"}
        elif pilot is not None:
            assert self.table.predictor is not None, "a pilot is drawn for a predictor only"
            scores = tuple(tuple(score or 0.0 for score in branch.scores) for branch in pilot.branches)
            found = features(Draws((), tuple(group or None for group in pilot.groups), scores if pilot.method.uses_prm else None))
            chances = self.table.predictor.chances(found)
            bin = likeliest(names, chances)
            why |= {"bin": bin, "by": "predicted", "chances": dict(zip(names, chances, strict=True)), "features": found}
        else:
            bin = names[0]
            why |= {"bin": None, "by": "no need"}
        return Choice(self.table.method(bin, self.n), why)

    def describe(self) -> dict[str, Any]:
        known = json.dumps(sorted(self.known.items())).encode()
        return {"n": self.n, "strategy": {"name": self.strategy.name, "sha256": self.strategy.sha256},
                "known": hashlib.sha256(known).hexdigest() if self.known else None}  # fmt: skip

    @property
    def _same(self) -> bool:
        """Whether there is nothing to choose."""
        return len({self.table.method(name, self.n) for name in self.table.bins.names}) == 1

    @property
    def _pilot(self) -> Pilot | None:
        return None if self._same or self.table.pilot is None else Pilot(draws=method_of(self.table.pilot))


def make_auto(
    strategy: Strategy | str | Path, *, n: int, policy: str | Path, prm: str | Path | None = None, task: str | None = None,
    load: str = "weights", known: Mapping[str, str] | None = None,
) -> Auto:  # fmt: skip
    """A strategy, one that ships or a file's, for these models and budget n; `known` as Auto has it. Raises StrategyError.

    >>> auto = make_auto("strategy.json", n=16, policy="path/or/hub-id", prm="path/or/hub-id")  # doctest: +SKIP
    >>> results = engine.search(problems, auto)  # doctest: +SKIP
    """
    strategy = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    table = table_for(strategy, policy=policy, prm=prm, task=task, load=load)
    return Auto(strategy=strategy, table=table, n=n, known=known or {})


def table_for(
    strategy: Strategy, *, policy: str | Path, prm: str | Path | None = None, task: str | None = None, load: str = "weights"
) -> Table:  # fmt: skip
    """The first table for these models, directories or hub ids as an engine takes them; a fitted one serves these very weights.

    Raises StrategyError where there is none.
    """
    directories = [resolve_checkpoint(name, load) if name is not None else None for name in (policy, prm)]
    for table in strategy.tables:
        if _serves(table, Path(policy).name, directories[0], directories[1], task, load):
            return table
    pairs = [f"{table.policy.name} with {table.prm.name if table.prm else 'no PRM'}" for table in strategy.tables if table.policy]
    fitted = f"; it was fitted on {', '.join(pairs)}" if pairs else ""
    asked = f"{Path(policy).name} with {Path(prm).name if prm else 'no PRM'}"
    raise StrategyError(f"the strategy {strategy.name} has no table for {asked}{fitted}")


def _serves(table: Table, name: str, policy: Path | None, prm: Path | None, task: str | None, load: str) -> bool:
    assert policy is not None, "every engine has a policy"
    if table.tasks and task not in table.tasks:
        return False
    if table.policies and not name.startswith(table.policies):
        return False
    low, high = table.parameters
    if low is not None or high is not None:
        count = SOURCES[load](policy).spec.num_parameters
        if count < (low or 0) or (high is not None and count >= high):
            return False
    if table.policy is not None and not _is(table.policy, policy):
        return False
    return table.prm is None or (prm is not None and _is(table.prm, prm))


def _is(model: Model, directory: Path) -> bool:
    return bool(model.sha256) and all(_sha256(directory / file) == digest for file, digest in model.sha256.items())


@lru_cache(maxsize=64)
def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as bytes_:
        return hashlib.file_digest(bytes_, "sha256").hexdigest()
