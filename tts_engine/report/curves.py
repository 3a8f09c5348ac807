"""A study drawn: accuracy over budget and over FLOPs, by difficulty, and small policies against large ones. PNGs in memory.

A method has one colour wherever it is drawn, a policy one marker, larger policies larger ones. Bands are 95 % intervals. All is
drawn on white; a page that is dark inverts it. matplotlib is imported when a figure is asked for.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

from ..errors import MissingExtra
from .arms import Arm, Grouping, Study
from .comparison import Share, share_of
from .sheets import Unit, unit_of
from .text import harmless

COLORS = {"cot": "#808890", "majority": "#3d85c8", "best_of_n": "#e08a00", "beam": "#1f9e73", "dvts": "#d4476a",
          "rebase": "#9a6dd0", "adaptive": "#00a3b5"}  # fmt: skip
OTHERS = ("#c2559d", "#a87b2f", "#7f8c3a")  # colours of methods that have none
AUTO, INK, GRID = "auto", "#1c2126", "#d8dde2"  # what a strategy chooses is to stand out, in ink
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))  # variants of one method
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # by size of the policy
SMALLEST, GROWTH = 4.5, 1.2  # marker sizes in points
DPI = 192  # two pixels for each of a page's
PIXEL = 96  # of a page, an inch
BAND, APART = 0.12, 1.4  # opacity of a band; ratio of neighbouring ticks at least
MARGIN = 3  # points above and below what is drawn
DENSE = 300  # ratio of its ends up to which an axis has three ticks a decade
LONGEST = 40  # characters of a name
LETTER, HANDLE = 0.078, 0.5  # inches of a legend's letter, and of the line before it
LINE, LINES = 46, 2  # of a panel's title: letters that fit into one, and how many there are


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure by a name that is a file's too. width, height: in a page's pixels."""

    name: str
    title: str
    note: str
    width: int
    height: int
    png: bytes


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: arms, and the share of problems that counts here. Without an arm it is a gap."""

    title: str
    arms: Sequence[Arm]
    share: Callable[[Arm], Share]


def figures(study: Study) -> list[Figure]:
    """Every figure of a report. Raises MissingExtra where matplotlib is not installed."""
    made = [accuracy_figure(study, over) for over in ("n", "flops")]
    for grouping in study.groupings:
        made += [difficulty_figure(study, grouping, prm) for prm in study.prms]
    if len(study.policies) > 1:
        made.append(size_figure(study))
    return made


def accuracy_figure(study: Study, over: str) -> Figure:
    """A column a policy, a row a PRM; over: "n" or "flops"."""
    panels = [[_policy_panel(study, policy, prm) for policy in study.policies] for prm in study.prms]
    title = "Accuracy against n" if over == "n" else "Accuracy against all FLOPs"
    note = (
        "n: candidate steps a round, or whole solutions. Equal n is not equal cost: see the next figure."
        if over == "n"
        else "FLOPs a problem without waste, policy and PRM together, on a logarithmic axis: further left is cheaper."
    )
    return _compared(study, f"accuracy-{over}", title, note, panels, over, "all" if over == "n" else "col")


def difficulty_figure(study: Study, grouping: Grouping, prm: str | None) -> Figure:
    """A row a policy, a column a bin."""
    panels = [
        [
            Panel(f"{policy}, {grouping.name} {bin} ({len(places)} problems)", study.of(policy, prm), _within(places))
            for bin in grouping.bins
            if (places := grouping.places(policy, study.ids, bin))
        ]
        for policy in study.policies
        if policy in grouping.of
    ]
    behind = "" if prm is None else f" with {prm}"
    number = "" if prm is None else f"-{study.prms.index(prm) + 1}"
    name = f"{'level' if grouping.name == 'level' else 'pass-rate'}{number}"
    title = f"Accuracy against all FLOPs by {grouping.name}{behind}"
    return _compared(study, name, title, "The same, for problems of each difficulty apart.", panels, "flops", "row")


def size_figure(study: Study) -> Figure:
    """All policies on one pair of axes, a column a PRM."""
    arms = {prm: [arm for arm in study.arms if arm.prm in (None, prm)] for prm in study.prms}
    panels = [[Panel("" if prm is None else f"with {prm}", own, _overall) for prm, own in arms.items()]]
    note = "Every policy on the same axes: a smaller policy's curve above a larger one's solves more for the same FLOPs."
    return _compared(study, "sizes", "Small policies against large ones", note, panels, "flops", "all", wide=5.6, high=4.6)


def _overall(arm: Arm) -> Share:
    return share_of(arm, range(len(arm.ids)))


def _within(places: Sequence[int]) -> Callable[[Arm], Share]:
    return lambda arm: share_of(arm, places)


def _policy_panel(study: Study, policy: str, prm: str | None) -> Panel:
    """What a policy does without a PRM stands beside each of its PRMs; in the first row where it has none."""
    arms = study.of(policy, prm)
    alone = all(arm.prm is None for arm in arms)
    if alone and (prm != study.prms[0] or study.has_prm(policy)):
        arms = []
    return Panel(policy if alone else f"{policy} with {prm}", arms, _overall)


# --- drawing ----------------------------------------------------------------------------------------------------------------


def drawn(name: str, title: str, note: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Figure:
    """A figure of so many inches; `draw` is given matplotlib's. Raises MissingExtra where matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise MissingExtra("a report needs matplotlib and it is not installed: pip install 'tts-engine[report]'") from None
    inked = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor"), INK)
    settings: Any = {"font.size": 9.0, "axes.linewidth": 0.6, "text.parse_math": False, **inked}
    with rc_context(settings):
        drawing = Drawing(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawing)
        draw(drawing)
        out = io.BytesIO()
        drawing.savefig(out, format="png")
    return Figure(name, title, note, round(size[0] * PIXEL), round(size[1] * PIXEL), out.getvalue())


def dressed(axes: Any, title: str) -> None:
    """What all axes look like."""
    axes.tick_params(labelsize=8, labelleft=True, labelbottom=True)
    axes.set_title("\n".join(wrap(harmless(title), LINE)[:LINES]), fontsize=9, loc="left")
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _compared(
    study: Study, name: str, title: str, note: str, panels: list[list[Panel]], over: str, alike: Literal["row", "col", "all"],
    wide: float = 3.7, high: float = 3.0,
) -> Figure:  # fmt: skip
    """alike: which panels have one axis of budgets, those of a "row", of a "col", or "all"."""
    rows = [row for row in panels if any(panel.arms for panel in row)]
    columns = max(map(len, rows))
    unit, look = unit_of(study), _Look(study)
    bounds = [bound for row in rows for panel in row for arm in panel.arms for bound in panel.share(arm).interval]
    groups: dict[int, list[float]] = {}
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            groups.setdefault({"row": down, "col": across, "all": 0}[alike], []).extend(_places(panel, over, unit))

    def draw(drawing: Any) -> None:
        grid = drawing.subplots(len(rows), columns, squeeze=False, sharey=True, sharex=alike)
        for down, row in enumerate(rows):
            for across, axes in enumerate(grid[down]):
                if across < len(row) and row[across].arms:
                    places = sorted(set(groups[{"row": down, "col": across, "all": 0}[alike]]))
                    _panel(axes, row[across], over, unit, look, places or [1.0])
                    axes.set_ylim(max(-MARGIN, 100 * min(bounds) - MARGIN), min(100 + MARGIN, 100 * max(bounds) + MARGIN))
                    axes.set_ylabel("problems solved, %" if across == 0 else "")
                else:
                    axes.set_axis_off()
        _legend(drawing, rows, look)

    return drawn(name, title, note, (wide * columns + 0.5, high * len(rows) + 0.9), draw)


class _Look:
    """How each method and policy is drawn, the same in all figures of a study."""

    def __init__(self, study: Study) -> None:
        self.policies = study.policies
        self.methods = study.methods
        names = [method.split(" ")[0] for method in self.methods]
        others = list(dict.fromkeys(name for name in names if name not in COLORS and name != AUTO))
        self._colors = COLORS | {AUTO: INK} | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
        self._dashes = {method: DASHES[names[:i].count(names[i]) % len(DASHES)] for i, method in enumerate(self.methods)}

    def line(self, method: str) -> dict[str, Any]:
        return {"color": self._colors[method.split(" ")[0]], "linestyle": self._dashes[method],
                "linewidth": 2.0 if method.split(" ")[0] == AUTO else 1.4}  # fmt: skip

    def mark(self, policy: str) -> dict[str, Any]:
        place = self.policies.index(policy)
        return {"marker": MARKERS[place % len(MARKERS)], "markersize": SMALLEST + GROWTH * place}


def _place(arm: Arm, share: Share, over: str, unit: Unit) -> float:
    """Where an arm stands on the axis of budgets; 0 for what cost nothing, which a logarithmic axis has no place for."""
    return float(arm.n) if over == "n" else (share.gflop or 0.0) / unit.gflop


def _places(panel: Panel, over: str, unit: Unit) -> list[float]:
    return [at for arm in panel.arms if (at := _place(arm, panel.share(arm), over, unit)) > 0]


def _panel(axes: Any, panel: Panel, over: str, unit: Unit, look: _Look, places: Sequence[float]) -> None:
    """places: on the axis of budgets, those of all panels that have the same, in order."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    curves: dict[tuple[str, str, str | None], list[tuple[float, Share]]] = {}
    for arm in sorted(panel.arms, key=lambda arm: arm.n):
        share = panel.share(arm)
        at = _place(arm, share, over, unit)
        if share.accuracy is not None and at > 0:
            curves.setdefault((arm.policy, arm.method, arm.prm), []).append((at, share))
    margin = (places[-1] / places[0]) ** 0.05 if places[-1] > places[0] else 3.0
    axes.set_xscale("log", base=2 if over == "n" else 10)
    axes.set_xlim(places[0] / margin, places[-1] * margin)
    for (policy, method, _), points in curves.items():
        spent, solved = [at for at, _ in points], [100 * (share.accuracy or 0.0) for _, share in points]
        low, high = ([100 * share.interval[side] for _, share in points] for side in (0, 1))
        line, mark = look.line(method), look.mark(policy)
        if len(points) > 1:
            axes.fill_between(spent, low, high, color=line["color"], alpha=BAND, linewidth=0)
        else:
            axes.vlines(spent, low, high, color=line["color"], alpha=0.6, linewidth=1.0)
        axes.plot(spent, solved, **line, **mark, markeredgecolor="white", markeredgewidth=0.6, zorder=3, clip_on=False)
        if method == "cot":
            axes.axhline(solved[0], color=line["color"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if over == "n":
        axes.xaxis.set_major_locator(FixedLocator(_spread(places)))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if places[-1] < DENSE * places[0] else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("n" if over == "n" else f"{unit.name} a problem, policy and PRM")
    dressed(axes, panel.title)


def _legend(drawing: Any, panels: list[list[Panel]], look: _Look) -> None:
    """Methods by colour; policies by marker, where one pair of axes holds several."""
    from matplotlib.lines import Line2D

    arms = [arm for row in panels for panel in row for arm in panel.arms]
    drawn = {arm.method for arm in arms}
    handles = [Line2D([], [], label=_short(method), **look.line(method)) for method in look.methods if method in drawn]
    if any(len({arm.policy for arm in panel.arms}) > 1 for row in panels for panel in row):
        handles += [Line2D([], [], linestyle="", color=INK, label=_short(policy), **look.mark(policy))
                    for policy in look.policies if any(arm.policy == policy for arm in arms)]  # fmt: skip
    columns = max(1, int(drawing.get_figwidth() / (HANDLE + LETTER * max(len(str(handle.get_label())) for handle in handles))))
    drawing.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=1.8)


def _spread(places: Sequence[float]) -> list[float]:
    """Those of the budgets that leave room for one another's labels, the first among them."""
    kept = list(places[:1])
    for place in places[1:]:
        if place >= APART * kept[-1]:
            kept.append(place)
    return kept


def _short(name: str) -> str:
    name = " ".join(harmless(name).split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
