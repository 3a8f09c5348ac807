"""How far a measured share, a difference of two or any other figure over problems can be trusted. Numbers only.

Wilson's interval is for shares in which a problem counts once. Wherever a problem brings more than that (several draws, a pair of
methods, a cost) problems are resampled with all that belongs to them, since they are what was chosen at random; draws of one
problem are never taken for independent. The bootstrap is BCa (Efron 1987): as wide as the percentile interval, but moved, so that
it misses about as often above as below also where values are skewed, as pass rates and costs are; the percentile interval misses
such means twice as often above as below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy is loaded by who resamples: tables with Wilson's intervals do without
    import numpy as np

BOOTSTRAPS = 10_000
AT_ONCE = 1 << 18  # problems resampled in one piece, for the memory it takes
NORMAL = NormalDist()

HOLDS, FAILS, CANNOT_TELL = "holds", "does not hold", "cannot tell"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): inside [0, 1] and of some width even at 0 or all successes.

    Nothing measured bounds nothing: (0, 1) for no trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials are no share")
    if trials == 0:
        return 0.0, 1.0
    z = NORMAL.inv_cdf(0.5 + confidence / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """A figure over problems, what it was in each resample (in order of size), and BCa's two corrections: the bias of the
    resamples' median and the acceleration, both on the scale of a standard normal."""

    estimate: float
    resampled: "np.ndarray"  # float64 [BOOTSTRAPS]
    bias: float
    acceleration: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where no resample differs from another it has no width."""
        import numpy as np

        tail = 0.5 - confidence / 2
        low, high = np.quantile(self.resampled, [self._level(tail), self._level(1 - tail)])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided, that the figure is 0: the interval of confidence 1 - p is the narrowest that still holds 0.

        Never below one in so many resamples.
        """
        import numpy as np

        count = len(self.resampled)
        below = np.searchsorted(self.resampled, 0.0, "left") + np.searchsorted(self.resampled, 0.0, "right")
        moved = NORMAL.inv_cdf(min(max(below / (2 * count), 0.5 / count), 1 - 0.5 / count)) - self.bias
        z = moved / (1 + self.acceleration * moved) - self.bias if 1 + self.acceleration * moved > 0 else math.inf
        return min(1.0, max(2 * NORMAL.cdf(-abs(z)), 1 / count))

    def _level(self, level: float) -> float:
        """The share of resamples that lie below the bound which a normal figure would have at `level`."""
        moved = self.bias + NORMAL.inv_cdf(level)
        return NORMAL.cdf(self.bias + moved / max(1 - self.acceleration * moved, 1e-9))


def bootstrap(values: Any, of: "Callable[[np.ndarray], np.ndarray] | None" = None, seed: int = 0) -> Bootstrap:
    """A figure of the means over problems. values: [problems], or [problems, k] of k quantities each; a problem that was drawn
    several times brings the mean of its draws. of: means [..., k] -> the figure [...], of one quantity its mean by default:

    >>> bootstrap([[3.0, 1.0], [5.0, 1.0]], of=lambda means: means[..., 0] / means[..., 1]).estimate  # a ratio of two costs
    4.0

    Raises ValueError for no problems.
    """
    import numpy as np

    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    return bootstraps(table, [of or (lambda means: means[..., 0])], seed)[0]


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of first[i] - second[i], and its interval by resampling problems.

    Pairs cancel what makes a problem hard for both, so this is narrower than two intervals side by side.
    """
    import numpy as np

    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} outcomes are no pairs")
    found = bootstrap(np.asarray(first, float) - np.asarray(second, float), seed=seed)
    return found.estimate, *found.interval(confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a study says of one claim: `difference` and its own interval, its p-value alone and among the other claims."""

    difference: float
    interval: tuple[float, float]
    p_value: float
    p_holm: float
    outcome: str  # HOLDS, FAILS or CANNOT_TELL


def verdicts(claims: Mapping[str, Sequence[float]], confidence: float = 0.95, seed: int = 0) -> dict[str, Verdict]:
    """Whether each claim holds, among all of them. A claim is a name and, problem by problem, what is claimed to be above 0 on
    average: the difference of a pair, or of two differences.

    "holds": its interval lies above 0; "does not hold": below; "cannot tell": it contains 0. With several claims each must pass
    at the level that Holm's steps leave it, so that one wrong claim among all is as rare as with one claim alone. `interval` is
    each claim's own. Claims over equally many problems are resampled together.

    A resample cannot show what no problem shows: with m problems that differ, two signs of a fair coin agree that well by chance
    with probability 2^(1-m), and no claim is given a smaller p-value.
    """
    import numpy as np

    names = list(claims)
    tables = {name: np.asarray(claims[name], np.float64) for name in names}
    found: dict[str, Bootstrap] = {}
    for size in dict.fromkeys(len(table) for table in tables.values()):
        alike = [name for name in names if len(tables[name]) == size]
        columns = np.stack([tables[name] for name in alike], axis=1)
        figures = [lambda means, place=place: means[..., place] for place in range(len(alike))]
        found |= zip(alike, bootstraps(columns, figures, seed), strict=True)
    alone = {name: max(found[name].p_value, min(1.0, 2.0 ** (1 - np.count_nonzero(tables[name])))) for name in names}
    among = dict(zip(names, holm([alone[name] for name in names]), strict=True))
    told = {}
    for name in names:
        estimate = found[name].estimate
        outcome = CANNOT_TELL if among[name] > 1 - confidence else HOLDS if estimate > 0 else FAILS
        told[name] = Verdict(
            difference=estimate,
            interval=found[name].interval(confidence),
            p_value=alone[name],
            p_holm=among[name],
            outcome=outcome,
        )
    return told


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values as they stand among all of them (Holm 1979): the smallest counts as often as there are claims, the next once less,
    and none counts for less than a smaller one."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted


def bootstraps(table: "np.ndarray", figures: "Sequence[Callable[[np.ndarray], np.ndarray]]", seed: int = 0) -> list[Bootstrap]:
    """Several figures of the same problems, float64 [problems, k], from the same resamples; each as `bootstrap` takes one."""
    import numpy as np

    size = len(table)
    if not size:
        raise ValueError("there is no problem to resample")
    rng, pieces, left = np.random.default_rng(seed), [], BOOTSTRAPS
    while left:
        rows = min(left, max(1, AT_ONCE // size))
        chosen = rng.integers(size, size=(rows, size), dtype=np.int32) + size * np.arange(rows)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=rows * size).reshape(rows, size)
        pieces.append(counts @ table / size)
        left -= rows
    means, whole = np.concatenate(pieces), table.mean(0)
    without = (table.sum(0) - table) / max(size - 1, 1)  # the means with one problem left out
    return [_corrected(float(of(whole)), np.asarray(of(means)), np.asarray(of(without))) for of in figures]


def _corrected(estimate: float, resampled: "np.ndarray", without: "np.ndarray") -> Bootstrap:
    """resampled [B]: the figure in each resample; without [problems]: the figure with one problem left out."""
    import numpy as np

    near = 1e-9 * (abs(estimate) + float(np.ptp(resampled)))  # sums in another order differ in their last bits
    ties, count = np.count_nonzero(abs(resampled - estimate) <= near), len(resampled)
    below = np.count_nonzero(resampled < estimate - near) + ties / 2
    influence = without.mean() - without
    scale = float(np.sum(influence**2)) ** 1.5
    return Bootstrap(
        estimate=estimate,
        resampled=np.sort(resampled),
        bias=NORMAL.inv_cdf(min(max(below / count, 0.5 / count), 1 - 0.5 / count)) if ties < count else 0.0,
        acceleration=float(np.sum(influence**3)) / (6 * scale) if scale > 0 else 0.0,
    )
