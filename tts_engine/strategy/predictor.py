"""How hard a problem is without its answer: a few pilot draws, how far they agree and what the PRM thinks of them.

The model is a proportional-odds logistic regression: one weight a feature, one threshold between neighbouring bins. It is fitted
to predict chances, not bins, so that what it says of 100 problems is about what they are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from . import StrategyError
from .difficulty import Draws

AGREEMENT, PRM = ("agreement",), ("prm_mean", "prm_spread")  # what is known of every pilot, and what a PRM adds
RIDGE = 1.0  # as if each parameter had been seen once to be near 0: bins that no problem fell into keep finite thresholds
FOLDS = 5
MOST_STEPS = 100


def features(draws: Draws) -> dict[str, float]:
    """agreement: the share of draws behind the most frequent answer, no answer agreeing with none; prm_mean and prm_spread: mean
    and standard deviation over draws of the lowest step score, where a PRM read them. (On calibration problems of the embedded
    task it tells more than the last step's.)"""
    counts = Counter(group for group in draws.groups if group is not None)
    found = {"agreement": max(counts.values(), default=0) / len(draws.groups)}
    if draws.scores is not None:
        lowest = [min(path) for path in draws.scores]
        found |= {"prm_mean": float(np.mean(lowest)), "prm_spread": float(np.std(lowest))}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """P(a problem is of bin k or an easier one) = sigmoid(sum of weight * (feature - centre) / scale + threshold k)."""

    features: tuple[str, ...]
    draws: int  # pilot draws that the features are of
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    thresholds: tuple[float, ...]  # rising, one fewer than bins
    # known bin -> predicted bin -> calibration problems, each predicted by the others
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {len(self.features), len(self.centres), len(self.scales), len(self.weights)}
        if len(sizes) > 1 or not set(self.features) <= {*AGREEMENT, *PRM} or self.draws < 1:
            raise StrategyError(f"a predictor has a centre, a scale and a weight for each of its features, some of "
                                f"{', '.join(AGREEMENT + PRM)}, and at least one draw")  # fmt: skip
        if not all(scale > 0 for scale in self.scales) or list(self.thresholds) != sorted(self.thresholds):
            raise StrategyError("a predictor's scales are above 0 and its thresholds rise")

    @property
    def uses_prm(self) -> bool:
        return bool(set(PRM) & set(self.features))

    def chances(self, found: dict[str, float]) -> list[float]:
        """Of each bin, easiest first."""
        z = [(found[name] - centre) / scale for name, centre, scale in zip(self.features, self.centres, self.scales, strict=True)]
        lean = float(np.dot(self.weights, z))
        below = [0.0, *_sigmoid(lean + np.array(self.thresholds)).tolist(), 1.0]
        return [high - low for low, high in zip(below, below[1:], strict=False)]


def fit_predictor(found: Sequence[dict[str, float]], known: Sequence[str], names: Sequence[str], draws: int) -> Predictor:
    """found: the features of each problem, of so many draws; known: its bin, one of `names`, easiest first.

    Raises StrategyError for fewer problems than folds.
    """
    columns = tuple(name for name in (*AGREEMENT, *PRM) if all(name in one for one in found))
    places = np.array([list(names).index(name) for name in known])
    predicted = cross_predict(found, known, names, draws)
    confusion = {name: dict.fromkeys(names, 0) for name in names}
    for ours, theirs in zip(known, predicted, strict=True):
        confusion[ours][theirs] += 1
    return replace(_fit(found, places, columns, len(names), draws), confusion=confusion)


def cross_predict(found: Sequence[dict[str, float]], known: Sequence[str], names: Sequence[str], draws: int) -> list[str]:
    """The likeliest bin of each problem by a predictor fitted to the others, in FOLDS parts: problem i is in part i mod FOLDS."""
    if len(found) < FOLDS:
        raise StrategyError(f"{len(found)} problems are too few to predict how hard others are: give at least {FOLDS}")
    columns = tuple(name for name in (*AGREEMENT, *PRM) if all(name in one for one in found))
    places = np.array([list(names).index(name) for name in known])
    predicted = [""] * len(found)
    for fold in range(FOLDS):
        others = [i for i in range(len(found)) if i % FOLDS != fold]
        model = _fit([found[i] for i in others], places[others], columns, len(names), draws)
        for i in range(fold, len(found), FOLDS):
            predicted[i] = likeliest(names, model.chances(found[i]))
    return predicted


def likeliest(names: Sequence[str], chances: Sequence[float]) -> str:
    """Of equal chances the easier bin."""
    return names[max(range(len(names)), key=lambda place: chances[place])]


def _fit(found: Sequence[dict[str, float]], places: np.ndarray, columns: tuple[str, ...], bins: int, draws: int) -> Predictor:
    """Weights and thresholds at once, by Newton's method on the ridge-penalised loss of all thresholds (Rennie and Srebro 2005):
    to each threshold every problem is a yes or a no, all with the same weights. It is convex, and keeps thresholds in order."""
    table = np.array([[one[name] for name in columns] for one in found])
    centres, scales = table.mean(0), table.std(0)
    scales[scales < 1e-9] = 1.0  # a feature that never differs has weight 0
    z = (table - centres) / scales
    cuts, count = bins - 1, len(z)
    design = np.concatenate([np.repeat(z, cuts, axis=0), np.tile(np.eye(cuts), (count, 1))], axis=1)
    easier = (places[:, None] <= np.arange(cuts)).astype(float).ravel()
    parameters = np.zeros(design.shape[1])

    def loss(at: np.ndarray) -> float:
        lean = design @ at
        return float(np.logaddexp(0, lean).sum() - lean @ easier + RIDGE / 2 * at @ at)

    for _ in range(MOST_STEPS):
        chance = _sigmoid(design @ parameters)
        slope = design.T @ (chance - easier) + RIDGE * parameters
        bend = (design * (chance * (1 - chance))[:, None]).T @ design + RIDGE * np.eye(len(parameters))
        step, length = np.linalg.solve(bend, slope), 1.0
        while length > 1e-6 and loss(parameters - length * step) > loss(parameters):
            length /= 2
        parameters = parameters - length * step
        if np.abs(step).max() < 1e-9:
            break
    weights, thresholds = parameters[: len(columns)], parameters[len(columns) :]

    def plain(values: np.ndarray) -> tuple[float, ...]:
        return tuple(float(value) for value in values)

    return Predictor(
        features=columns,
        draws=draws,
        centres=plain(centres),
        scales=plain(scales),
        weights=plain(weights),
        thresholds=plain(np.maximum.accumulate(thresholds)),
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
