"""Which cells a recipe comes to, in which order they are made, and from what.

What is drawn without a PRM is drawn once a policy: all majorities and all best-of-N of the same rules have the same draws, so those
of the largest n are searched as a majority, a cell of its own whether it is asked for or not, and the others are made from it. A
best-of-N under one PRM alone, with no majority beside it, is searched as it is. Only the largest DVTS is searched; beam search,
rebase, auto and chain of thought always are.

Models are swapped as rarely as can be: all cells of a policy under one PRM stand together, with them, under its first PRM, those
that read none. A cell stands behind the one that it is made from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..search import Method
from ..search.best_of_n import BestOfN, Majority
from ..search.dvts import Dvts
from . import RUNS
from .recipe import AutoEntry, Recipe

SEARCHED, REPLAYED, RESCORED = "searched", "replayed", "rescored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the sweep. policy, prm: as the recipe names them; prm: also where the method is auto, which may read it.

    made: searched; replayed: from the draws, and the scores, of `source`; rescored: from its draws, which this PRM read.
    pilot: it only tells how hard problems are.
    """

    name: str
    policy: str
    prm: str | None
    method: Method | AutoEntry
    seed: int
    made: str = SEARCHED
    source: str | None = None  # a cell's name
    pilot: bool = False

    @property
    def directory(self) -> str:
        return f"{RUNS}/{self.name}"

    def as_dict(self) -> dict[str, Any]:
        """For sweep.json; what else the method is told stands in its run.json."""
        return {
            "name": self.name, "policy": self.policy, "prm": self.prm, "method": self.method.name, "n": self.method.n,
            "seed": self.seed, "directory": self.directory, "made": self.made,
            "from": f"{RUNS}/{self.source}" if self.source is not None else None, "pilot": self.pilot,
        }  # fmt: skip


def plan(recipe: Recipe) -> list[Cell]:
    """All cells, in the order in which they are made."""
    cells = list[Cell]()
    taken = set[str]()
    for policy in recipe.policies:
        names = dict[Key, str]()
        if recipe.pilot is not None and recipe.pilot_method is not None:
            name = _name(policy, None, "pilot", recipe.pilot.n, taken)
            cells.append(Cell(name=name, policy=policy, prm=None, method=recipe.pilot_method, seed=recipe.pilot.seed, pilot=True))
        for i, prm in enumerate(recipe.prms or [None]):
            for key, made, source in _under(recipe, policy, prm, first=i == 0):
                names[key] = _name(policy, key[0], key[1].name, key[1].n, taken)
                cells.append(Cell(name=names[key], policy=policy, prm=key[0], method=key[1], seed=recipe.seed, made=made,
                                  source=names[source] if source is not None else None))  # fmt: skip
    return cells


Key = tuple[str | None, Method | AutoEntry]  # a policy's cell: PRM and method


def _under(recipe: Recipe, policy: str, prm: str | None, first: bool) -> Iterator[tuple[Key, str, Key | None]]:
    """The policy's cells under one PRM, how each is made and from what. first: those that read none, too."""
    entries = recipe.entries_of(policy)
    majorities = dict.fromkeys(entry for entry in entries if isinstance(entry, Majority))
    best = [entry for entry in entries if isinstance(entry, BestOfN)]
    for entry in best:
        if len(recipe.prms) > 1 or any(_alike(entry, other) for other in majorities):
            majorities[_draws(entry, max(other.n for other in best if _alike(other, entry)))] = None
    if first:
        for method in entries:
            if not isinstance(method, AutoEntry | Majority) and not method.uses_prm:
                yield (None, method), SEARCHED, None
        for majority in sorted(majorities, key=lambda m: -m.n):
            largest = max((m for m in majorities if _alike(m, majority)), key=lambda m: m.n)
            if majority == largest:
                yield (None, majority), SEARCHED, None
            elif majority in entries:
                yield (None, majority), REPLAYED, (None, largest)
    for entry in sorted(best, key=lambda m: -m.n):
        largest_best = max((other for other in best if _alike(other, entry)), key=lambda m: m.n)
        if entry != largest_best:
            yield (prm, entry), REPLAYED, (prm, largest_best)
        elif draws := [majority for majority in majorities if _alike(majority, entry)]:
            yield (prm, entry), RESCORED, (None, max(draws, key=lambda m: m.n))
        else:
            yield (prm, entry), SEARCHED, None
    subtrees = [entry for entry in entries if isinstance(entry, Dvts)]
    for dvts in sorted(subtrees, key=lambda m: -m.n):
        widest = max((other for other in subtrees if _subtree(other) == _subtree(dvts)), key=lambda m: m.n)
        if dvts == widest:
            yield (prm, dvts), SEARCHED, None
        else:
            yield (prm, dvts), REPLAYED, (prm, widest)
    for method in entries:
        if isinstance(method, AutoEntry) or (method.uses_prm and not isinstance(method, BestOfN | Dvts)):
            yield (prm, method), SEARCHED, None


def _draws(entry: BestOfN | Majority, n: int) -> Majority:
    """Its draws as a majority of n."""
    return Majority(n=n, rules=entry.rules, max_steps=entry.max_steps)


def _alike(one: BestOfN | Majority, other: BestOfN | Majority) -> bool:
    """Whether they draw alike, n apart."""
    return (one.rules, one.max_steps) == (other.rules, other.max_steps)


def _subtree(dvts: Dvts) -> tuple[Any, ...]:
    return dvts.width, dvts.rules, dvts.max_steps


def _name(policy: str, prm: str | None, what: str, n: int, taken: set[str]) -> str:
    """Of a cell's directory: its own, and of characters that may stand in a path."""
    parts = [Path(policy).name, *([Path(prm).name] if prm is not None else []), what, *([f"n{n}"] if what != "cot" else [])]
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in "-".join(parts))
    number, own = 1, name
    while own in taken:
        number += 1
        own = f"{name}-{number}"
    taken.add(own)
    return own
