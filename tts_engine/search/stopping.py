"""Whether a vote of n draws is decided before all are made: surely, or but for a probability that is stated and kept.

The draws of a search are independent and alike, so all orders of the n answers (with their weights) are equally likely, and the
first k of them are a sample without replacement of all n. That a given answer wins the vote of all n is then a statement about
a finite population, tested while it is sampled, as an audit tests that a given candidate has won an election (Stark 2023, ALPHA,
arXiv 2201.02707). The test is by betting (Waudby-Smith and Ramdas 2024, arXiv 2010.09686): before each draw a stake is put on the
leader against that answer. If the answer wins the vote of all n, the capital is not expected to grow at any draw, and so it comes
to 1 / bound at some time with probability `bound` at most (Ville 1939). An answer against which it does is ruled out. The vote is
settled once all but the leader are: the leader is wrong only where the winner was ruled out.

So of all problems whose vote is settled early, or of all repetitions of one, a share of at most `bound` is expected to end in
another answer than the n draws would have given, whatever the answers are and how likely, whatever the policy and the PRM, and
however often one looks. Nothing is assumed of the distribution. A posterior of the two foremost answers, as Adaptive-Consistency
asks it (Aggarwal et al. 2023, arXiv 2305.11860), stops sooner, and is wrong more often than it says where two answers are equally
likely.
"""

import math
from collections.abc import Hashable
from statistics import NormalDist

NORMAL = NormalDist()
STAKES = (0.25, 0.5, 0.75, 1.0)  # shares of the most that can be staked without debt; a quarter of the capital plays each


class SumVote:
    """A vote by sums of weights in [0, 1], as its `total` draws come; with weights of 1 a majority."""

    def __init__(self, total: int, bound: float = 0.0) -> None:
        self.total, self.bound = total, bound
        self.drawn = 0
        self._weights: dict[Hashable, list[float]] = {}  # by answer, in the order in which answers were first seen
        self._sums: dict[Hashable, float] = {}
        self._squares: dict[Hashable, float] = {}
        # Against each answer, and under None against all that nobody has given yet: the capital by stake, and who is ruled out.
        self._capital: dict[Hashable | None, list[float]] = {None: [1.0] * len(STAKES)}
        self._out: set[Hashable | None] = set()

    @property
    def leader(self) -> Hashable | None:
        """The answer of the largest sum, of equals the one seen first; None before any answer."""
        return max(self._sums, key=lambda answer: self._sums[answer], default=None)

    def count(self, answer: Hashable | None, weight: float = 1.0) -> None:
        """Take the next draw in; None and "" are no answer."""
        answer = None if answer == "" else answer
        leader = self.leader
        if answer is not None and answer not in self._sums:
            self._weights[answer], self._sums[answer], self._squares[answer] = [], 0.0, 0.0
            self._capital[answer] = list(self._capital[None])
            if None in self._out:
                self._out.add(answer)
        if self.bound > 0 and leader is not None:
            self._bet(leader, answer, weight)
        self.drawn += 1
        if answer is not None:
            self._weights[answer].append(weight)
            self._sums[answer] = math.fsum(self._weights[answer])
            self._squares[answer] += weight * weight

    @property
    def settled(self) -> bool:
        """Whether no other answer can win any more, but for the bound."""
        if self.drawn == self.total:
            return True
        leader = self.leader
        if leader is None:
            return False
        seen = list(self._sums)
        ahead = seen[: seen.index(leader)]  # whom a tie serves
        for rival in self._capital.keys() - self._out - {leader}:
            most = math.fsum([*self._weights.get(rival, ()), self.total - self.drawn])
            if most > self._sums[leader] or (most == self._sums[leader] and rival in ahead):
                return False
        return True

    @property
    def doubt(self) -> float:
        """How likely the runner-up is in truth the more likely of the two, about: the normal approximation to the posterior of two
        shares from an even prior. An estimate to compare problems by, no bound."""
        ranked = sorted(self._sums, key=lambda answer: -self._sums[answer])[:2]
        lead = sum(sign * self._sums[answer] for sign, answer in zip((1, -1), ranked, strict=False))
        return NORMAL.cdf(-lead / math.sqrt(1 + sum(self._squares[answer] for answer in ranked)))

    def _bet(self, leader: Hashable, answer: Hashable | None, weight: float) -> None:
        """Play the draw that comes, on the leader so far against every other answer.

        A draw is worth its weight to the leader or to the other, up to 1; if that other wins, those that are still to come are
        worth no more than `mean` to the leader on average.
        """
        for rival, capital in self._capital.items():
            if rival == leader or rival in self._out:
                continue
            mean = (self._sums.get(rival, 0.0) - self._sums[leader]) / (self.total - self.drawn)
            if mean <= -1:  # it cannot win any more
                continue
            gain = weight * ((answer == leader) - (answer == rival)) if answer is not None else 0.0
            for i, stake in enumerate(STAKES):
                capital[i] *= 1 + stake * (gain - mean) / (1 + mean)
            if sum(capital) * self.bound >= len(STAKES):
                self._out.add(rival)


class MaxVote:
    """A vote by the largest weight in [0, 1] alone, as its `total` draws come.

    Among draws in random order the best of all is among the first k with probability k / total, and nothing that was drawn tells
    more about it: the vote is settled after all but a share `bound` of the draws, or by a weight of 1.
    """

    def __init__(self, total: int, bound: float = 0.0) -> None:
        self.total, self.bound = total, bound
        self.drawn = 0
        self.leader: Hashable | None = None
        self._best = -1.0
        self._counts: dict[Hashable, int] = {}

    def count(self, answer: Hashable | None, weight: float) -> None:
        """Take the next draw in; None and "" are no answer."""
        self.drawn += 1
        if answer is None or answer == "":
            return
        self._counts[answer] = self._counts.get(answer, 0) + 1
        if weight > self._best:
            self.leader, self._best = answer, weight

    @property
    def settled(self) -> bool:
        """Whether no other answer can win any more, but for the bound."""
        if self.drawn == self.total:
            return True
        return self.leader is not None and (self._best >= 1 or self.total - self.drawn <= self.bound * self.total)

    @property
    def doubt(self) -> float:
        """How likely the next draw is the best so far and has another answer, about; to compare problems by."""
        others = sum(self._counts.values()) - self._counts.get(self.leader, 0)
        return (others + 1) / (self.drawn + 2) / (self.drawn + 1)
