"""Diverse verifier tree search: n // width searches side by side from the same prompt, each keeping one branch.

A subtree is a beam search with one survivor, in a lane of its own: subtrees draw different steps, and subtree j draws the
same ones whatever n is. Their answers are voted together (the reference code leaves each subtree's answer in its own file).
"""

from dataclasses import dataclass
from typing import ClassVar

from ..branch import Branch
from .beam_search import BeamSearch
from .ranking import top
from .requests import Expand, Join, Program, Score
from .rules import PAPER, Rules, check_settings
from .voting import LAST_VOTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Dvts:
    """n candidate steps a round, `width` in each of n // width independent subtrees."""

    name: ClassVar[str] = "dvts"
    uses_prm: ClassVar[bool] = True
    vote: ClassVar[str] = LAST_VOTE
    n: int
    width: int = 4
    rules: Rules = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(n=self.n, width=self.width, max_steps=self.max_steps, rules=self.rules)

    @property
    def temperature(self) -> float:
        return self.rules.temperature

    def program(self, root: Branch) -> Program:
        narrow = BeamSearch(n=self.width, width=self.width, rules=self.rules, max_steps=self.max_steps)
        subtree = self._sibling_subtree if self.rules.voted == "n" else narrow.program
        subtrees = yield Join([subtree(root) for _ in range(self.n // self.width)])
        return [branch for branches in subtrees for branch in branches]

    def _sibling_subtree(self, root: Branch) -> Program:
        """A subtree as search-and-learn grows it: follow the best child until it has finished, then return all its siblings.

        A finished child that is not the best of its round is lost, and there is no pool to refill: `width` draws a round.
        """
        best, siblings = root, list[Branch]()

        def ahead(candidates: list[Branch]) -> list[Branch]:
            return [child for child in top(candidates, 1, self.rules.selects_by) for _ in range(self.width) if not child.finished]

        while not best.finished:
            entries = [best] * self.width
            children = yield Expand(entries, outlook=self.rules.outlook(ahead, self.max_steps))
            siblings = yield Score(self.rules.admit(entries, children, self.max_steps))
            best = top(siblings, 1, self.rules.selects_by)[0]
        return siblings
