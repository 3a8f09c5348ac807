"""REBASE, reward balanced search (Wu et al., arXiv 2408.00724): good branches get more draws, none is cut by rank alone.

Each round divides the budget among the live branches by softmax(score / balance). A branch that finishes takes one unit of
the budget with it, so a search ends with at most n answers, and all of them are voted.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..branch import Branch
from .ranking import aggregate, divide, rank, repeat
from .requests import Expand, Program, Score
from .rules import PAPER, MethodError, Rules, check_settings
from .voting import LAST_VOTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebase:
    """n candidate steps in the first round, fewer by one for every branch that has finished.

    balance: the softmax temperature over scores; small is greedy, large is even. The paper uses 0.1. Shares are rounded by
    largest remainder, so the budget is always spent exactly; a branch whose share is 0 is not continued. Of the rules,
    `finished` and `voted` do not apply.
    """

    name: ClassVar[str] = "rebase"
    uses_prm: ClassVar[bool] = True
    vote: ClassVar[str] = LAST_VOTE
    n: int
    balance: float = 0.1
    rules: Rules = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(n=self.n, max_steps=self.max_steps, rules=self.rules)
        if not 0 < self.balance < math.inf:
            raise MethodError(f"balance must be a number above 0, not {self.balance!r}")

    @property
    def temperature(self) -> float:
        return self.rules.temperature

    def program(self, root: Branch) -> Program:
        entries, finished = [root] * self.n, list[Branch]()

        def ahead(candidates: list[Branch]) -> list[Branch]:
            live = rank([branch for branch in candidates if not branch.finished], self.rules.selects_by)
            return repeat(live, divide(len(live), self._weights(live)))

        while entries:
            children = yield Expand(entries, outlook=self.rules.outlook(ahead, self.max_steps))
            candidates = yield Score(self.rules.admit(entries, children, self.max_steps))
            finished += [branch for branch in candidates if branch.finished]
            live = [branch for branch in candidates if not branch.finished]
            entries = repeat(live, divide(self.n - len(finished), self._weights(live)))
        return finished

    def _weights(self, live: list[Branch]) -> list[float]:
        scores = [aggregate(branch.scores, self.rules.selects_by) / self.balance for branch in live]
        return [math.exp(score - max(scores)) for score in scores]
