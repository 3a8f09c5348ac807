"""How much less compute one way of searching takes than another for the same accuracy.

Both are curves through what was measured: accuracy over FLOPs a problem, policy and PRM, straight between neighbouring budgets on
a logarithmic axis of FLOPs, nothing beyond the ends. The accuracy asked for is that of the baseline's largest budget; each curve
is charged for the cheapest point at which it has it. The factor is the baseline's FLOPs over the other's: above 1, the other
takes less.

Both curves start from chain of thought where it was run, since that is what either is worth at next to no budget. A curve that
never has that accuracy, or may have had it before its first point, bounds the factor from one side only. So do resamples of
problems, which give the interval: where too many of them bound nothing on a side, neither does the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arms import Arm
from .intervals import bootstraps

if TYPE_CHECKING:
    import numpy as np

UNBOUNDED = 9.0  # powers of ten: no factor that could be measured
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Factor:
    """estimate: None where the curves bound it on one side or none. low, high: of the 95 % interval, None where there is no bound.
    reached: whether the method has the baseline's accuracy at all."""

    estimate: float | None
    low: float | None
    high: float | None
    reached: bool

    @property
    def outcome(self) -> str:
        """ "less", "more" or "cannot tell", as the interval lies above 1, below, or across."""
        return "less" if self.low and self.low > 1 else "more" if self.high and self.high < 1 else "cannot tell"


def efficiency(method: Sequence[Arm], baseline: Sequence[Arm], cheapest: Arm | None = None, seed: int = 0) -> Factor | None:
    """method, baseline: their arms at some budgets, of the same problems. cheapest: the arm from which both curves start. None
    where there is no arm, or one that cost nothing."""
    import numpy as np

    curves = [([cheapest] if cheapest is not None else []) + sorted(arms, key=lambda arm: arm.n) for arms in (method, baseline)]
    if not method or not baseline or not all(sum(arm.flops) > 0 for arms in curves for arm in arms):
        return None
    table = np.array([column for arms in curves for arm in arms for column in (arm.solved, arm.flops)]).T
    split = 2 * len(curves[0])

    def bounds(means: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
        """Powers of ten between which the factor lies: one number twice where both curves tell."""
        (spent_low, spent_high), (had_low, had_high) = (
            _first(np.log10(np.maximum(part[..., 1::2], 1e-300)), part[..., ::2], means[..., -2, None], cheapest is not None)
            for part in (means[..., :split], means[..., split:])
        )
        return np.clip(had_low - spent_high, -UNBOUNDED, UNBOUNDED), np.clip(had_high - spent_low, -UNBOUNDED, UNBOUNDED)

    tail = 0.5 - CONFIDENCE / 2
    lower, upper = bootstraps(table, [lambda means: bounds(means)[0], lambda means: bounds(means)[1]], seed)
    low, high = float(np.quantile(lower.resampled, tail)), float(np.quantile(upper.resampled, 1 - tail))
    return Factor(
        estimate=10**lower.estimate if lower.estimate == upper.estimate else None,
        low=10**low if low > -UNBOUNDED else None,
        high=10**high if high < UNBOUNDED else None,
        reached=any(arm.accuracy >= curves[1][-1].accuracy for arm in curves[0]),
    )


def _first(
    spent: "np.ndarray", solved: "np.ndarray", asked: "np.ndarray", whole: bool
) -> tuple["np.ndarray", "np.ndarray"]:  # fmt: skip
    """Between which powers of ten a curve first has an accuracy. spent, solved: [..., points]; asked: [..., 1]; whole: nothing
    comes before its first point."""
    import numpy as np

    has = solved >= asked - 1e-12
    place = np.argmax(has, axis=-1)[..., None]

    def at(values: "np.ndarray", places: "np.ndarray") -> "np.ndarray":
        return np.take_along_axis(values, places, -1)[..., 0]

    before = np.maximum(place - 1, 0)
    gained = at(solved, place) - at(solved, before)
    part = np.where(gained > 0, (asked[..., 0] - at(solved, before)) / np.where(gained > 0, gained, 1.0), 1.0)
    between = at(spent, before) + np.clip(part, 0, 1) * (at(spent, place) - at(spent, before))
    low = np.where((place[..., 0] > 0) | whole, between, -np.inf)
    high = np.where(place[..., 0] > 0, between, spent[..., 0])
    never = ~has.any(-1)
    return np.where(never, spent[..., -1], low), np.where(never, np.inf, high)
