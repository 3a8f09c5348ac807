"""A PRM's diagnostics drawn: scores against what came true, against the length of steps, and what choosing by them gains with n."""

from typing import Any

from .curves import BAND, COLORS, DASHES, Figure, drawn, dressed
from .diagnostics import Calibration, Choice, Diagnostics, Estimate, Length

WIDE, HIGH = 3.7, 3.7  # inches of a panel
WHOLE = (-3, 103)  # percent of an axis
GOOD, SCORE, PLAIN = COLORS["beam"], COLORS["majority"], COLORS["cot"]
AGGREGATES = {"last": COLORS["best_of_n"], "min": COLORS["dvts"], "mean": COLORS["rebase"]}  # the rules' colours
VOTES = {"max": DASHES[0], "vote": DASHES[1]}


def diagnostics_figure(found: Diagnostics, name: str) -> Figure:
    """Those of the three that the data give. Raises MissingExtra where matplotlib is not installed."""
    parts: list[tuple[Any, Any]] = [(_reliability, found.step_scores), (_by_length, found.length), (_choosing, found.choice)]
    told = [(draw, part) for draw, part in parts if part is not None]

    def draw(drawing: Any) -> None:
        [row] = drawing.subplots(1, len(told), squeeze=False)
        for axes, (panel, part) in zip(row, told, strict=True):
            panel(axes, part)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize=8, handlelength=1.6)

    note = "Bands are 95 % intervals by resampling problems."
    return drawn(name, f"{found.subject.prm} on {found.subject.source}", note, (WIDE * len(told) + 0.3, HIGH), draw)


def _reliability(axes: Any, steps: Calibration) -> None:
    bins = [one for one in steps.bins if one.mean_score is not None]
    axes.plot([0, 100], [0, 100], color=PLAIN, linewidth=0.9, linestyle=DASHES[2], label="as good as its score")
    _line(axes, [100 * (one.mean_score or 0.0) for one in bins], [one.true for one in bins], GOOD, "steps")
    axes.set_xlabel("mean score, %")
    axes.set_ylabel("good steps, %")
    axes.set_ylim(*WHOLE)
    dressed(axes, "steps by score")


def _by_length(axes: Any, length: Length) -> None:
    middles = [(one.low + one.high) / 2 for one in length.bins]
    _line(axes, middles, [one.mean_score for one in length.bins], SCORE, "mean score")
    _line(axes, middles, [one.good for one in length.bins], GOOD, "good steps")
    axes.set_xlabel("tokens of a step")
    axes.set_ylabel("%")
    axes.set_ylim(*WHOLE)
    dressed(axes, "steps by length")


def _choosing(axes: Any, choice: Choice) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = sorted({point.n for point in choice.curve})
    for rule in dict.fromkeys(point.rule for point in choice.curve):
        points = [point for point in choice.curve if point.rule == rule]
        aggregate, _, vote = rule.partition("_")
        color, dashes = AGGREGATES.get(aggregate, SCORE), VOTES.get(vote, DASHES[0])
        _line(axes, [point.n for point in points], [point.accuracy for point in points], color, rule, dashes=dashes, band=False)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("draws to choose among")
    axes.set_ylabel("problems solved, %")
    dressed(axes, "choosing by the scores")


def _line(
    axes: Any, x: list[Any], y: list[Estimate], color: str, label: str, *, dashes: Any = DASHES[0], band: bool = True
) -> None:  # fmt: skip
    """Those of the estimates that have a value; their intervals as a band, or as bars where some have none."""
    known = [(at, one) for at, one in zip(x, y, strict=True) if one.value is not None]
    if not known:
        return
    bounds = [(at, 100 * one.low, 100 * one.high) for at, one in known if one.low is not None and one.high is not None]
    if band and bounds:
        if len(bounds) == len(known):
            axes.fill_between(*zip(*bounds, strict=True), color=color, alpha=BAND, linewidth=0)
        else:
            axes.vlines(*zip(*bounds, strict=True), color=color, alpha=0.5, linewidth=1.0)
    places, values = [at for at, _ in known], [100 * (one.value or 0.0) for _, one in known]
    axes.plot(places, values, color=color, linestyle=dashes, linewidth=1.4, marker="o", markersize=4, markeredgecolor="white",
              markeredgewidth=0.6, label=label)  # fmt: skip
