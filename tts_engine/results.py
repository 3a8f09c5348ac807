"""What a search gives back."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .branch import Branch
from .ledger import Ledger
from .tasks.problems import Problem

if TYPE_CHECKING:
    from .search import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """One finished search.

    `answer` is the search's own choice: the last-score vote where a PRM took part, the majority where none did.
    `branches[i]` was voted with the extracted answer `answers[i]` in the group `groups[i]` (None: no answer); `aggregates`
    holds what each way of choosing gives. `nodes` is every step drawn, kept or not, in the order they closed.
    """

    problem: Problem
    method: "Method"
    seed: int
    answer: str | None
    aggregates: dict[str, str | None]
    branches: list[Branch]
    answers: list[str | None]
    groups: list[str | None]
    nodes: list[Branch] = field(repr=False)
    ledger: Ledger = field(repr=False)

    @property
    def chosen(self) -> Branch | None:
        """The best branch behind the answer: the highest last score, of equals (and without a PRM) the first."""
        behind = [b for b, group in zip(self.branches, self.groups, strict=True) if group == self.answer]
        return max(behind, key=lambda b: b.score or 0.0, default=None)
