"""The main job: does a small policy with search beat a large one without, and for how much compute?

Runs the embedded models over test problems, every method apart, and keeps the runs, a table, a plot and a verdict.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .embedded import BLOCK_SIZE, model_path
from .engine import Engine
from .errors import EngineError
from .report.intervals import paired_difference
from .report.progress import Progress
from .report.table import Cell, cell_of
from .report.text import figures
from .runs import Run, describe_run, evaluate
from .search import Method, make_method
from .tasks.problems import load_task

TASK, SPLIT = "embedded", "test"
SMALL, LARGE, PRM = "policy-s", "policy-l", "prm-good"
BUDGETS = (4, 16)
SMALL_METHODS = ("majority", "best_of_n", "beam", "dvts")
CHOSEN = ("best_of_n", 16)  # the search that stands for the small policy: the best of six on calibration problems


def methods_of(names: Sequence[str]) -> list[Method]:
    """Chain of thought, which has no budget, and the named methods at every budget."""
    return [make_method("cot"), *(make_method(name, n=n) for name in names for n in BUDGETS)]


# policy, PRM, methods: in the order in which they run and are shown
LINE_UP: list[tuple[str, str | None, list[Method]]] = [
    (SMALL, PRM, methods_of(SMALL_METHODS)),
    (LARGE, None, methods_of(("majority",))),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The small policy's chosen search against the large one's single greedy answer, problem by problem.

    The search was chosen on other problems than these, so the interval is not that of the luckiest of several.
    """

    small: Cell
    large: Cell
    large_majority: Cell
    difference: float
    interval: tuple[float, float]

    @property
    def outcome(self) -> str:
        """ "beat", "lost" or "cannot tell", as the 95 % interval of the difference lies above, below or across zero."""
        low, high = self.interval
        return "beat" if low > 0 else "lost" if high < 0 else "cannot tell"

    @property
    def sentence(self) -> str:
        claim = {
            "beat": "The small policy with search beat the large one without",
            "lost": "The small policy with search did not beat the large one without",
            "cannot tell": "These problems cannot tell whether the small policy with search beats the large one without",
        }[self.outcome]
        low, high = (100 * bound for bound in self.interval)
        return (
            f"{claim}: {_told(self.small)} (a search chosen on calibration problems), "
            f"against {_told(self.large)}, a paired difference of {100 * self.difference:+.1f} points (95 % interval {low:+.1f} to "
            f"{high:+.1f}); {_told(self.large_majority)}."
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome, "sentence": self.sentence, "difference": self.difference, "interval_95": list(self.interval),
            "small": self.small.as_dict(), "large": self.large.as_dict(), "large_majority": self.large_majority.as_dict(),
        }  # fmt: skip


def _told(cell: Cell) -> str:
    cost = figures(cell.gflop_per_problem)
    return f"{cell.policy} with {cell.label} solves {100 * cell.accuracy:.1f} % at {cost} GFLOP a problem in all"


def verdict(cells: Sequence[Cell]) -> Verdict:
    """What the cells say; the large policy's majority is told beside it at the largest budget."""

    def cell(policy: str, method: str, n: int) -> Cell:
        [found] = [cell for cell in cells if (cell.policy, cell.method, cell.n) == (policy, method, n)]
        return found

    small, large = cell(SMALL, *CHOSEN), cell(LARGE, "cot", 1)
    assert small.ids == large.ids, "both policies answered the same problems"
    difference, low, high = paired_difference(small.correct, large.correct)
    return Verdict(small=small, large=large, large_majority=cell(LARGE, "majority", max(BUDGETS)), difference=difference,
                   interval=(low, high))  # fmt: skip


def run_demo(problems: int, out: Path, progress: Progress, seed: int = 0) -> list[Cell]:
    """Every cell, its run in a directory of its own under `out`; runs that are there already are continued."""
    split = load_task(TASK, SPLIT)
    if problems > len(split):
        raise EngineError(f"the {TASK} task's {SPLIT} split has {len(split)} problems, not {problems}")
    cells = []
    for policy, prm, methods in LINE_UP:
        directories = [model_path(name) for name in (policy, prm) if name is not None]
        with Engine.from_pretrained(*directories, block_size=BLOCK_SIZE) as engine:
            for method in methods:
                description = describe_run(
                    policy=directories[0], prm=directories[1] if prm else None, config=engine.config, method=method, seed=seed,
                    task=TASK, split=SPLIT, limit=problems, problems=split,
                )  # fmt: skip
                name = method.name if method.n == 1 else f"{method.name}-n{method.n}"
                engine.forget()
                with Run(out / f"{policy}-{name}", description) as run:
                    progress.begin(f"{policy}, {name}", run.records)
                    evaluate(engine, split[:problems], method, run, seed=seed, finished=progress.advance)
                    cells.append(cell_of(run.records, policy, method.uses_prm))
    return cells


def default_directory() -> Path:
    return Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
