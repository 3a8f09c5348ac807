"""Beam search over steps: a round draws up to n candidates, the PRM scores them, the n // width best go on.

What a finished branch does, what is dropped and who is voted is in `rules`, preset by preset.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..branch import Branch
from .ranking import divide, repeat
from .requests import Expand, Program, Score
from .rules import PAPER, Rules, check_settings
from .voting import LAST_VOTE


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
    """n candidate steps a round, `width` continuations of each survivor."""

    name: ClassVar[str] = "beam"
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
        survivors = self.n // self.width
        entries, finished = [root] * self.n, list[Branch]()

        def ahead(candidates: list[Branch]) -> list[Branch]:
            live, _ = self.rules.select(candidates, finished, survivors)
            return repeat(live, [self.width] * len(live))

        while entries:
            children = yield Expand(entries, outlook=self.rules.outlook(ahead, self.max_steps))
            candidates = yield Score(self.rules.admit(entries, children, self.max_steps))
            live, finished = self.rules.select(candidates, finished, survivors)
            draws = self.n if self.rules.finished == "refill" else self.width * len(live)
            entries = repeat(live, divide(draws, [1.0] * len(live)))
        return self.rules.answers(finished, self.n, survivors)
