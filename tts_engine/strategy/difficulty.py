"""How hard a problem is for a policy: the share of right answers among draws that no evaluated search uses, and bins of it.

The draws come from a pilot run, a majority or best-of-N run with a seed of its own; with one seed a pilot and a search would share
draws, and a problem would be called easy because its search was lucky.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks.grader import Grader
from . import StrategyError

PILOTS = ("majority", "best_of_n")  # whose branches are independent draws
PAPER_EDGES = (0.5, 0.1)
QUANTILES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Names of bins, easiest first, and the pass rate from which on a problem belongs to each but the last."""

    kind: str  # "absolute" or "quantile"
    names: tuple[str, ...]
    edges: tuple[float, ...]  # falling

    def __post_init__(self) -> None:
        if self.kind not in ("absolute", "quantile"):
            raise StrategyError(f"bins are absolute or quantile, not {self.kind!r:.40}")
        if len(self.names) != len(self.edges) + 1 or len(set(self.names)) < len(self.names):
            raise StrategyError(f"{len(self.edges)} edges make {len(self.edges) + 1} bins of own names, not {self.names!r:.80}")
        if not all(0 < edge <= 1 for edge in self.edges) or list(self.edges) != sorted(set(self.edges), reverse=True):
            raise StrategyError(f"edges of bins are pass rates above 0 and up to 1, falling, not {self.edges!r:.80}")

    def of(self, rate: float) -> str:
        return self.names[sum(rate < edge for edge in self.edges)]


def absolute_bins(edges: Sequence[float] = PAPER_EDGES) -> Bins:
    """The paper's: easy from a pass rate of 50 % on, medium from 10 % on, hard below; or by other edges, falling."""
    bounds = [1.0, *edges, 0.0]
    ranges = [f"{100 * low:g}-{100 * high:g} %" for high, low in zip(bounds, bounds[1:], strict=False)]
    names = ("easy", "medium", "hard") if len(edges) == 2 else tuple(ranges)
    return Bins(kind="absolute", names=names, edges=tuple(edges))


def quantile_bins(rates: Sequence[float], count: int = QUANTILES) -> Bins:
    """Bins that hold equally many of these problems (Snell et al., arXiv 2408.03314), q1 the easiest.

    Problems of one pass rate stay together, so where many share one, bins are fewer or unequal: half of all problems at 0 are one.
    """
    ranked = sorted(rates, reverse=True)
    ends = dict.fromkeys(ranked[max(1, round(len(ranked) * i / count)) - 1] for i in range(1, count))
    edges = [edge for edge in ends if edge > ranked[-1]]
    return Bins(kind="quantile", names=tuple(f"q{i + 1}" for i in range(len(edges) + 1)), edges=tuple(edges))


@dataclass(frozen=True, slots=True)
class Draws:
    """A problem's pilot draws in their order. scores: of each draw its step scores; None where no PRM read them."""

    correct: tuple[bool, ...]
    groups: tuple[str | None, ...]
    scores: tuple[tuple[float, ...], ...] | None

    @property
    def pass_rate(self) -> float:
        return sum(self.correct) / len(self.correct)

    def only(self, start: int, stop: int | None = None) -> "Draws":
        scores = self.scores[start:stop] if self.scores is not None else None
        return Draws(self.correct[start:stop], self.groups[start:stop], scores)


def read_draws(record: dict[str, Any], grader: Grader) -> Draws | None:
    """The draws of one problem of a pilot run; None where it could not be searched. Raises StrategyError for one without gold."""
    if record["error"] is not None:
        return None
    gold, nodes, voted = record["gold"], record["nodes"], record["branches"]
    if gold is None:
        raise StrategyError(f"problem {record['id']} has no known answer, so how hard it is cannot be measured")
    verdicts = {answer: grader.equal(gold, answer) for answer in {branch["answer"] for branch in voted}}

    def scores(place: int) -> tuple[float, ...]:
        found = []
        while place >= 0:
            found.append(nodes[place]["score"])
            place = nodes[place]["parent"]
        return tuple(reversed(found))

    paths = tuple(scores(branch["node"]) for branch in voted)
    unread = any(None in path for path in paths)
    return Draws(
        correct=tuple(verdicts[branch["answer"]] for branch in voted),
        groups=tuple(branch["group"] or None for branch in voted),
        scores=None if unread else paths,
    )


def refuse_as_pilot(pilot: dict[str, Any], name: str) -> None:
    """Raise StrategyError where a run, by its description, is none whose draws tell how hard a problem is."""
    method = pilot["method"]
    if method["name"] not in PILOTS:
        raise StrategyError(f"{name} is a run of {method['name']}: only independent draws tell how hard a problem is, those of "
                            f"{' or '.join(PILOTS)}")  # fmt: skip
    if not method["rules"]["temperature"] > 0:
        raise StrategyError(f"{name} drew at temperature 0, all draws alike: they tell nothing of how hard a problem is")


def refuse_shared_draws(pilot: dict[str, Any], pilot_name: str, evaluated: dict[str, Any], name: str) -> None:
    """Raise StrategyError where a pilot run and an evaluated one, by their descriptions, share draws: the same policy and seed."""
    if pilot["policy"]["sha256"] == evaluated["policy"]["sha256"] and pilot["seed"] == evaluated["seed"]:
        raise StrategyError(f"{pilot_name} and {name} share their draws, both of seed {pilot['seed']}: how hard problems are must "
                            "come from draws that no evaluated search uses, so make the pilot run with another --seed")  # fmt: skip
