"""Answers to one answer: majority, the best trajectory's, or a vote weighted by scores.

Answers are any hashable values; the caller has already mapped equal answers to equal values (exact string or canonical form).
None and "" mean that a trajectory holds no answer. Such a trajectory takes no part, whatever its weight; where none holds an
answer, or there is no trajectory, the outcome is None. Of tied answers the one seen first wins.
"""

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

from .ranking import AGGREGATES, aggregate

MAJORITY, LAST_VOTE = "majority", "last_vote"
CHOICES = (MAJORITY, *(f"{by}_{how}" for by in AGGREGATES for how in ("max", "vote")))

A = TypeVar("A", bound=Hashable)


def vote(answers: Sequence[A | None], weights: Sequence[float]) -> A | None:
    """The answer with the largest sum of weights (PRM-Vote). Sums are exact, so order decides nothing but ties."""
    groups: dict[A, list[float]] = {}
    for answer, weight in _present(answers, weights):
        groups.setdefault(answer, []).append(weight)
    return max(groups, key=lambda answer: math.fsum(groups[answer]), default=None)


def majority(answers: Sequence[A | None]) -> A | None:
    """The answer given most often."""
    return vote(answers, [1.0] * len(answers))


def best(answers: Sequence[A | None], weights: Sequence[float]) -> A | None:
    """The answer of the trajectory with the largest weight (PRM-Max)."""
    present = _present(answers, weights)
    return max(present, key=lambda pair: pair[1])[0] if present else None


def all_aggregates(answers: Sequence[A | None], scores: Sequence[tuple[float | None, ...]] | None) -> dict[str, A | None]:
    """Every way to choose at once, one of CHOICES each; without step scores "majority" alone.

    answers[i] and scores[i] (one number a step) belong to trajectory i. `scores` is None where no PRM took part.
    """
    outcomes = {MAJORITY: majority(answers)}
    if scores is None:
        return outcomes
    for by in AGGREGATES:
        weights = [aggregate(path, by) for path in scores]
        outcomes[f"{by}_max"] = best(answers, weights)
        outcomes[f"{by}_vote"] = vote(answers, weights)
    return outcomes


def _present(answers: Sequence[A | None], weights: Sequence[float]) -> list[tuple[A, float]]:
    return [(answer, weight) for answer, weight in zip(answers, weights, strict=True) if answer is not None and answer != ""]
