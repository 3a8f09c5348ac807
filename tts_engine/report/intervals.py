"""How far a measured share, or a difference of two, can be trusted. Numbers only."""

import math
from collections.abc import Sequence
from statistics import NormalDist

BOOTSTRAPS = 10_000


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): inside [0, 1] and of some width even at 0 or all successes.

    Nothing measured bounds nothing: (0, 1) for no trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials are no share")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of first[i] - second[i], and its interval by resampling problems (percentile bootstrap, seeded).

    Pairs cancel what makes a problem hard for both, so this is narrower than two intervals side by side.
    """
    import numpy as np

    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} outcomes are no pairs")
    differences = np.array(first, float) - np.array(second, float)
    # Only how many pairs were won, tied and lost matters, so a resample is one multinomial draw.
    counts = [np.count_nonzero(differences == value) / len(differences) for value in (1, 0, -1)]
    won, _, lost = np.random.default_rng(seed).multinomial(len(differences), counts, size=BOOTSTRAPS).T
    low, high = np.quantile((won - lost) / len(differences), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(differences.mean()), float(low), float(high)
