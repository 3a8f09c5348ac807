"""Accuracy against compute, as a PNG. matplotlib is imported when a plot is asked for."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingExtra
from .table import Cell

MARKERS = {"cot": "o", "majority": "s", "best_of_n": "D", "beam": "^", "dvts": "v", "rebase": "P"}


def plot_accuracy(cells: Sequence[Cell], file: Path, title: str) -> None:
    """One line a policy and method, one point a budget n, bars of 95 % confidence.

    Raises MissingExtra where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("a plot needs matplotlib and it is not installed: pip install 'tts-engine[plot]'") from None
    figure = Figure(figsize=(9.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for policy, method in dict.fromkeys((cell.policy, cell.method) for cell in cells):
        points = sorted((cell for cell in cells if (cell.policy, cell.method) == (policy, method)), key=lambda cell: cell.n)
        x = [cell.gflop_per_problem for cell in points]
        y = [100 * cell.accuracy for cell in points]
        bars = [[max(0.0, 100 * (cell.accuracy - cell.interval[0])) for cell in points],
                [max(0.0, 100 * (cell.interval[1] - cell.accuracy)) for cell in points]]  # fmt: skip
        first = policy == policies[0]
        axes.errorbar(x, y, yerr=bars, label=f"{policy}, {method}", color=f"C{methods.index(method)}", linestyle="-" if first else "--",
                      marker=MARKERS.get(method, "o"), markersize=7, markerfacecolor=None if first else "white",
                      linewidth=1.6, elinewidth=0.8, capsize=3)  # fmt: skip
        for cell, at_x, at_y in zip(points, x, y, strict=True):
            if cell.method != "cot":
                axes.annotate(str(cell.n), (at_x, at_y), xytext=(6, 5), textcoords="offset points", fontsize=8,
                              color=f"C{methods.index(method)}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("GFLOP per problem, policy and PRM (log scale)")
    axes.set_ylabel("problems solved, % (bars: 95 % interval)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="major", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="policy, method\n(numbers: n)", title_fontsize=9)
    figure.savefig(file)
