"""A budget that several searches share, spent where a vote may still change.

The searches draw their first trajectories whatever the budget is, since a problem without an answer is worth nothing, and then go
on in rounds: once every one of them is over or asks for more, those come first in which a further draw is likeliest to tell, per
unit of what a draw of theirs has cost so far. A quarter of those that ask go on in one round, so that a machine has something to
batch, and are then weighed anew. Nobody is given what would, at that rate, cost more than is left; when nobody is given anything,
the rest end with the answers they have. What is spent can differ from the budget by what the last round's draws cost more, or
less, than those before them.

Who goes on depends on draws, scores and their costs alone, and costs in tokens and FLOPs are those of an ideal executor, see
ledger.py, which follow from what was drawn. So the same searches are given the same whatever runs beside what; what is executed is
more by what a later batch draws again. Seconds depend on the machine and its mood, and what they buy with them.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ledger import Ledger
from .rules import MethodError

TOKENS, FLOPS, SECONDS = "tokens", "flops", "s"
PART = 4  # one in so many goes on in a round
_FORM = re.compile(rf"([0-9]+\.?[0-9]*(?:e\+?[0-9]{{1,3}})?)({TOKENS}|{FLOPS}|{SECONDS})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Budget:
    """For all searches of one call together. In tokens that went through a model's layers, policy or PRM; FLOPs; or seconds."""

    amount: float
    unit: str


@dataclass(frozen=True, slots=True)
class Cost:
    tokens: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Standing:
    """A search that asks for `draws` more. cost: of all it has done, `drawn` draws among that. doubt: as stopping.py has it."""

    id: str
    doubt: float
    drawn: int
    draws: int
    cost: Cost


class Allocation:
    """A budget under way."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.perf_counter) -> None:
        self.budget = budget
        self._clock, self._started = clock, clock()
        self._ended = Cost()

    def end(self, cost: Cost) -> None:
        """A search is over and cost this much."""
        self._ended += cost

    def grants(self, standings: Sequence[Standing], part: int = PART) -> set[str]:
        """Ids of those that go on in this round, one in `part` of them at most; none: all is spent that can be."""
        spent = sum((one.cost for one in standings), self._ended)
        price = self._price(spent)
        prices = {one.id: price(one.cost) * one.draws / one.drawn for one in standings}
        left, granted = self.budget.amount - price(spent), set[str]()
        for one in sorted(standings, key=lambda one: (-one.doubt / prices[one.id], one.id)):
            if prices[one.id] <= left and len(granted) * part < len(standings):
                granted.add(one.id)
                left -= prices[one.id]
        return granted

    def _price(self, spent: Cost) -> Callable[[Cost], float]:
        """What a cost comes to in the budget's unit; in seconds, by what a FLOP has taken so far."""
        if self.budget.unit == TOKENS:
            return lambda cost: cost.tokens
        if self.budget.unit == FLOPS:
            return lambda cost: cost.flops
        passed = self._clock() - self._started
        return lambda cost: cost.flops * passed / spent.flops


def executed(budget: Budget, ledger: Ledger) -> float:
    """What searches took in the budget's unit, waste and their first draws among it, whoever could pay for them."""
    tokens = ledger.policy.tokens_computed + ledger.prm.tokens_computed
    return {TOKENS: tokens, FLOPS: ledger.flops, SECONDS: ledger.seconds}[budget.unit]


def read_budget(text: str) -> Budget:
    """Raises MethodError for anything but a number above 0 and a unit: 50000tokens, 2e9flops, 60s."""
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None or not 0 < float(match[1]) < math.inf:
        raise MethodError(f"budget must be a number above 0 of {TOKENS}, {FLOPS} or {SECONDS}, such as 50000tokens, 2e9flops or "
                          f"60s, not {text!r:.40}")  # fmt: skip
    return Budget(float(match[1]), match[2])
