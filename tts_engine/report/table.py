"""What runs cost and what they got right: one cell a run, one table for all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..ledger import PETA, Ledger
from .intervals import wilson
from .text import figures, percent

GIGA = 1e9
WIDE, WIDEST = 100, 120  # columns of a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy under one method. `correct` says for each problem, in the order of `ids`, whether it was solved."""

    policy: str
    method: str
    n: int
    uses_prm: bool
    ids: tuple[str, ...]
    correct: tuple[bool, ...]
    ledger: Ledger  # of all problems; its seconds are the run's

    @property
    def label(self) -> str:
        return self.method if self.method == "cot" else f"{self.method} n={self.n}"

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.correct), len(self.correct))

    @property
    def gflop(self) -> float:
        """Policy and PRM, over all problems."""
        return self.ledger.flops / GIGA

    @property
    def gflop_per_problem(self) -> float:
        return self.gflop / len(self.correct)

    @property
    def correct_per_gflop(self) -> float:
        return sum(self.correct) / self.gflop if self.gflop else 0.0

    @property
    def correct_per_s(self) -> float:
        return sum(self.correct) / self.ledger.seconds if self.ledger.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        low, high = self.interval
        return {
            "policy": self.policy, "method": self.method, "n": self.n, "problems": len(self.correct), "correct": sum(self.correct),
            "accuracy": self.accuracy, "interval_95": [low, high], "gflop_per_problem": self.gflop_per_problem,
            "correct_per_gflop": self.correct_per_gflop, "correct_per_pflop": self.correct_per_gflop * PETA / GIGA,
            "correct_per_s": self.correct_per_s, "useful": self.ledger.useful, "wasted": self.ledger.wasted,
            "ledger": self.ledger.as_dict(),
        }  # fmt: skip


def cell_of(records: Iterable[dict[str, Any]], policy: str, uses_prm: bool) -> Cell:
    """The cell of one run's records, in order of their ids. A problem that failed was not solved."""
    ordered = sorted(records, key=lambda record: record["id"])
    total = Ledger.empty()
    for record in ordered:
        if record["ledger"]:
            total.add(Ledger.from_dict(record["ledger"]))
    total.seconds = sum(record["seconds"] for record in ordered)
    chosen = next((record["choice"] for record in ordered if record.get("choice")), None)  # problem by problem
    return Cell(
        policy=policy,
        method=ordered[0]["method"]["name"] if chosen is None else "auto",
        n=ordered[0]["method"].get("n", 1) if chosen is None else chosen["n"],
        uses_prm=uses_prm,
        ids=tuple(record["id"] for record in ordered),
        correct=tuple(bool(record["correct"]) for record in ordered),
        ledger=total,
    )


def prm_only(show: Callable[[Cell], str]) -> Callable[[Cell], str]:
    return lambda cell: show(cell) if cell.uses_prm else "-"


ACCURACY, USEFUL, CORRECT = "accuracy\n% (95 %)", "useful\n%", "correct\n/s"
SPARED = (USEFUL, CORRECT)  # where there is no room for all
COLUMNS: list[tuple[str, Callable[[Cell], str]]] = [
    ("policy", lambda c: c.policy),
    ("method", lambda c: c.method),
    ("n", lambda c: str(c.n)),
    (ACCURACY, lambda c: percent(c.accuracy, c.interval)),
    ("gener-\nated\nk tok", lambda c: figures(c.ledger.policy.tokens_generated / 1e3)),
    ("PRM read\nk tok", prm_only(lambda c: figures(c.ledger.prm.tokens_computed / 1e3))),
    ("re-read\nk tok", prm_only(lambda c: figures(c.ledger.prm.tokens_reread / 1e3))),
    ("policy\nGFLOP", lambda c: figures(c.ledger.policy.flops / GIGA)),
    ("PRM\nGFLOP", prm_only(lambda c: figures(c.ledger.prm.flops / GIGA))),
    (USEFUL, lambda c: "-" if c.ledger.useful is None else figures(100 * c.ledger.useful)),
    ("correct\n/GFLOP", lambda c: figures(c.correct_per_gflop)),
    (CORRECT, lambda c: figures(c.correct_per_s) if c.ledger.seconds else "-"),
    ("time\ns", lambda c: figures(c.ledger.seconds) if c.ledger.seconds else "-"),
]


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table as plain text, its headings first."""
    headings = [heading.replace("-\n", "").replace("\n", " ") for heading, _ in COLUMNS]
    return [headings, *([show(cell) for _, show in COLUMNS] for cell in cells)]


def table(cells: Sequence[Cell], title: str, width: int) -> Table:
    """The same for a terminal of `width` columns, a gap between policies. In 80 it just fits without SPARED, with intervals on a
    second line."""
    columns = [column for column in COLUMNS if width >= WIDEST or column[0] not in SPARED]
    drawn = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
                  padding=(0, int(width >= WIDE), 0, 0))  # fmt: skip
    for i, (heading, _) in enumerate(columns):
        longest = max(map(len, heading.split("\n")))
        drawn.add_column(
            heading, justify="left" if i < 2 else "right", no_wrap=heading != ACCURACY, min_width=longest, vertical="bottom"
        )
    for i, cell in enumerate(cells):
        last = i + 1 == len(cells) or cells[i + 1].policy != cell.policy
        drawn.add_row(*(Text(show(cell)) for _, show in columns), end_section=last)
    return drawn


def shared_aggregates(records: Sequence[dict[str, Any]]) -> list[str]:
    """The ways of choosing that all problems have; where methods differ from problem to problem some read a PRM and some do not.
    A problem that failed has none and does not count."""
    each = [record["aggregates"] for record in records if record["aggregates"]]
    return [name for name in each[0] if all(name in one for one in each)] if each else []


def aggregate_rows(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each way of choosing among the branches: its share of problems solved."""
    names = shared_aggregates(records)
    lines = []
    for name in names:
        solved = sum(bool(record["aggregates"].get(name, {}).get("correct")) for record in records)
        lines.append(f"{name:>10}  {percent(solved / len(records), wilson(solved, len(records)))} %")
    return lines
