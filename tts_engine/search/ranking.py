"""Scores to order: a branch's score from those of its steps, the best of a pool, a budget divided by weight.

Pure functions of numbers and branches; equal scores keep the order they came in, so the same pool always ranks the same.
"""

import math
from collections.abc import Callable, Sequence

from ..branch import Branch


def last(scores: tuple[float, ...]) -> float:
    """The newest step's score (PRM-Last)."""
    return scores[-1]


def mean(scores: tuple[float, ...]) -> float:
    """The average over steps (PRM-Avg)."""
    return math.fsum(scores) / len(scores)


AGGREGATES: dict[str, Callable[[tuple[float, ...]], float]] = {"last": last, "min": min, "mean": mean}


def aggregate(scores: Sequence[float | None], by: str) -> float:
    """One number for a path's step scores; `by` names an aggregate."""
    known = tuple(score for score in scores if score is not None and not math.isnan(score))
    assert known, "a path without scored steps has no aggregate: score it first, and never rank the root"
    assert len(known) == len(scores), f"{len(scores) - len(known)} of {len(scores)} steps carry no score: {tuple(scores)}"
    return AGGREGATES[by](known)


def rank(branches: Sequence[Branch], by: str) -> list[Branch]:
    """Best first; of equals the earlier one."""
    return sorted(branches, key=lambda branch: -aggregate(branch.scores, by))


def top(branches: Sequence[Branch], count: int, by: str) -> list[Branch]:
    """The `count` best of the whole pool, best first; all of them where there are fewer."""
    return rank(branches, by)[:count]


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares in proportion to `weights`, by largest remainder; of equal remainders the earlier gets one more."""
    if not weights:
        return []
    exact = [total * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def repeat(branches: Sequence[Branch], counts: Sequence[int]) -> list[Branch]:
    """Each branch as often as its count, siblings side by side: the entries of one Expand."""
    return [branch for branch, count in zip(branches, counts, strict=True) for _ in range(count)]
