"""What a search gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from .branch import Branch
from .ledger import Ledger
from .search.rules import Grouping
from .search.voting import all_aggregates
from .tasks.answers import extract_answer
from .tasks.grader import Grader
from .tasks.problems import Problem

if TYPE_CHECKING:
    from .search import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """One finished search.

    `answer` is the search's own choice, by its method's `vote`: the last-score vote where a PRM took part, the majority where none
    did, if it says nothing else.
    `branches[i]` was voted with the extracted answer `answers[i]` in the group `groups[i]` (None: no answer); `aggregates`
    holds what each way of choosing gives. `nodes` is every step drawn, kept or not, in the order they closed. `choice` says how
    the method was chosen where a Chooser did: then nodes and ledger hold what its pilot drew and cost, too.
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
    choice: dict[str, Any] | None = None

    @property
    def chosen(self) -> Branch | None:
        """The best branch behind the answer: the highest last score, of equals (and without a PRM) the first."""
        behind = [b for b, group in zip(self.branches, self.groups, strict=True) if group == self.answer]
        return max(behind, key=lambda b: b.score or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Choice:
    """The method for one problem, and what is recorded of how it was chosen; nothing where nobody chose."""

    method: "Method"
    why: dict[str, Any] | None = None


@runtime_checkable
class Chooser(Protocol):
    """Stands where a method stands, and chooses one for each problem: at once, or by what a pilot search of the problem finds.

    The pilot's draws must be none that a method takes (a lane of its own), since both run with the search's seed.
    """

    name: ClassVar[str]

    @property
    def methods(self) -> Sequence["Method"]:
        """All that it may run, the pilot first where there is one."""

    def pilot(self, problem: Problem) -> "Method | None":
        """What is searched before the choice; None where this problem needs no pilot."""

    def choose(self, problem: Problem, pilot: SearchResult | None) -> Choice: ...

    def describe(self) -> dict[str, Any]:
        """For run.json: plain JSON that tells this chooser from others."""


def read_answers(
    branches: Sequence[Branch], grouping: Grouping, grader: Grader
) -> tuple[list[str | None], list[str | None]]:  # fmt: skip
    """The answer in each trajectory, and the group in which it votes; both are the same whatever trajectories come behind it."""
    answers = [extract_answer(branch.solution) for branch in branches]
    return answers, grader.group(answers) if grouping == "canonical" else answers


def conclude(
    problem: Problem, choice: Choice, seed: int, branches: list[Branch], nodes: list[Branch], ledger: Ledger, grader: Grader
) -> SearchResult:  # fmt: skip
    """The result of a search that returned `branches` and drew `nodes`: answers, groups and every way of choosing among them."""
    method = choice.method
    answers, groups = read_answers(branches, method.rules.grouping, grader)
    aggregates = all_aggregates(groups, [branch.scores for branch in branches] if method.uses_prm else None)
    return SearchResult(
        problem=problem,
        method=method,
        seed=seed,
        answer=aggregates[method.vote],
        aggregates=aggregates,
        branches=branches,
        answers=answers,
        groups=groups,
        nodes=nodes,
        ledger=ledger,
        choice=choice.why,
    )
