"""Best-of-N and majority that stop: trajectories in small batches, until the vote cannot change any more.

Its draws are the first ones of the same vote over n draws, so with bound 0 the answer is the same, always; with a bound above 0 it
is another with that probability at most, see stopping.py. What is saved goes to other problems where they share a budget, see
allocation.py.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from ..branch import Branch
from .allocation import Budget, read_budget
from .ranking import aggregate
from .requests import Answers, Expand, Outlook, Program, Score
from .rules import PAPER, MethodError, Rules, check_settings
from .stopping import MaxVote, SumVote
from .voting import CHOICES, MAJORITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """At most n trajectories, `batch` at a time.

    vote: which choice among them is the answer and must not change, as voting.all_aggregates calls it; all but a majority take a
    PRM. bound: how likely the answer may be another than that of all n draws; 0: never. budget: what all problems of one call may
    cost together, see allocation.read_budget.
    """

    name: ClassVar[str] = "adaptive"
    n: int
    vote: str = MAJORITY
    bound: float = 0.0
    batch: int = 4
    budget: str | None = None
    rules: Rules = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(n=self.n, max_steps=self.max_steps, rules=self.rules)
        if self.vote not in CHOICES:
            raise MethodError(f"no vote {self.vote!r:.40}; known: {', '.join(CHOICES)}")
        if isinstance(self.bound, bool) or not isinstance(self.bound, int | float) or not 0 <= self.bound < 1:
            raise MethodError(f"bound must be a number of at least 0 and below 1, not {self.bound!r:.40}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise MethodError(f"batch must be a whole number of at least 1, not {self.batch!r:.40}")
        if self.budget is not None:
            read_budget(self.budget)

    @property
    def uses_prm(self) -> bool:
        return self.vote != MAJORITY

    @property
    def temperature(self) -> float:
        return self.rules.temperature

    @property
    def shared_budget(self) -> Budget | None:
        return None if self.budget is None else read_budget(self.budget)

    def program(self, root: Branch) -> Program:
        polls, voted = Polls(self), list[Branch]()
        outlook = Outlook(scored=lambda step: True) if self.uses_prm else None
        while polls.draws:
            doubt = polls.doubt if voted and self.budget is not None else None
            batch = yield Expand([root] * polls.draws, to_end=True, outlook=outlook, doubt=doubt)
            if not batch:
                break
            voted += (yield Score(batch)) if self.uses_prm else batch
            answers = yield Answers(voted)
            for branch, answer in list(zip(voted, answers, strict=True))[polls.drawn :]:
                polls.count(answer, branch.scores)
        return voted


class Polls:
    """The vote of one problem as its draws come, and how many are wanted next."""

    def __init__(self, method: Adaptive) -> None:
        self._by, _, how = method.vote.partition("_")
        self._batch = method.batch
        self._vote = (MaxVote if how == "max" else SumVote)(method.n, method.bound)

    @property
    def drawn(self) -> int:
        return self._vote.drawn

    @property
    def leader(self) -> Hashable | None:
        return self._vote.leader

    @property
    def doubt(self) -> float:
        return self._vote.doubt

    @property
    def draws(self) -> int:
        """0 where the vote is settled."""
        return 0 if self._vote.settled else min(self._batch, self._vote.total - self.drawn)

    def count(self, answer: Hashable | None, scores: tuple[float | None, ...]) -> None:
        """scores: of the trajectory's steps; a majority does not look at them."""
        self._vote.count(answer, 1.0 if self._by == MAJORITY else aggregate(scores, self._by))
