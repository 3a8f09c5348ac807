"""The methods without steps: one greedy trajectory, many and a majority, many and a PRM.

Each trajectory is drawn to its end in one request; whoever draws ends one that is still open after `max_steps` steps
(Finish.DEPTH). All n count in the vote under every preset: of the rules only temperature and grouping apply.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..branch import Branch
from .requests import Expand, Outlook, Program, Score
from .rules import PAPER, Rules, check_settings
from .voting import LAST_VOTE, MAJORITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Cot:
    """Chain of thought: one greedy trajectory. A single answer leaves the rules nothing to decide."""

    name: ClassVar[str] = "cot"
    uses_prm: ClassVar[bool] = False
    vote: ClassVar[str] = MAJORITY
    n: ClassVar[int] = 1
    rules: ClassVar[Rules] = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(max_steps=self.max_steps, rules=self.rules)

    @property
    def temperature(self) -> float:
        return 0.0

    def program(self, root: Branch) -> Program:
        return (yield Expand([root], to_end=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Majority:
    """n trajectories, the most frequent answer (self-consistency)."""

    name: ClassVar[str] = "majority"
    uses_prm: ClassVar[bool] = False
    vote: ClassVar[str] = MAJORITY
    n: int
    rules: Rules = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(n=self.n, max_steps=self.max_steps, rules=self.rules)

    @property
    def temperature(self) -> float:
        return self.rules.temperature

    def program(self, root: Branch) -> Program:
        return (yield Expand([root] * self.n, to_end=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """n trajectories, scored when they are whole."""

    name: ClassVar[str] = "best_of_n"
    uses_prm: ClassVar[bool] = True
    vote: ClassVar[str] = LAST_VOTE
    n: int
    rules: Rules = PAPER
    max_steps: int = 40

    def __post_init__(self) -> None:
        check_settings(n=self.n, max_steps=self.max_steps, rules=self.rules)

    @property
    def temperature(self) -> float:
        return self.rules.temperature

    def program(self, root: Branch) -> Program:
        trajectories = yield Expand([root] * self.n, to_end=True, outlook=Outlook(scored=lambda step: True))
        return (yield Score(trajectories))
