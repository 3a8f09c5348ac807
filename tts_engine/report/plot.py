"""Accuracy against compute, as a PNG. matplotlib is imported when a plot is asked for."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingExtra
from .table import Cell

MARKERS = {"cot": "o", "majority": "s", "best_of_n": "D", "beam": "^", "dvts": "v", "rebase": "P", "adaptive": "X"}
SMALLEST, GROWTH = 5.5, 3.5  # marker sizes in points: of the smallest n, and more for every n above it


def plot_accuracy(cells: Sequence[Cell], file: Path, title: str) -> None:
    """One line a policy and method, one point a budget n (larger ones for larger n), bars of 95 % confidence.

    Raises MissingExtra where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ImportError:
        raise MissingExtra("a plot needs matplotlib and it is not installed: pip install 'tts-engine[plot]'") from None
    figure = Figure(figsize=(9.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    budgets = sorted({cell.n for cell in cells if cell.n > 1})
    for policy, method in dict.fromkeys((cell.policy, cell.method) for cell in cells):
        points = sorted((cell for cell in cells if (cell.policy, cell.method) == (policy, method)), key=lambda cell: cell.n)
        color, marker, first = f"C{methods.index(method)}", MARKERS.get(method, "o"), policy == policies[0]
        face = color if first else "white"
        x, y = [cell.gflop_per_problem for cell in points], [100 * cell.accuracy for cell in points]
        bars = [[max(0.0, at - 100 * cell.interval[0]) for at, cell in zip(y, points, strict=True)],
                [max(0.0, 100 * cell.interval[1] - at) for at, cell in zip(y, points, strict=True)]]  # fmt: skip
        line = "-" if first else "--"
        axes.errorbar(x, y, yerr=bars, color=color, linestyle=line, linewidth=1.4, elinewidth=0.8, capsize=2.5, alpha=0.75)
        for cell, at_x, at_y in zip(points, x, y, strict=True):
            grown = SMALLEST + GROWTH * (budgets.index(cell.n) if cell.n in budgets else 0)
            axes.plot(at_x, at_y, marker=marker, markersize=grown, color=color, markerfacecolor=face, zorder=3)
        axes.plot([], [], color=color, linestyle=line, marker=marker, markerfacecolor=face, label=f"{policy}, {method}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, min(100, 100 * max(cell.interval[1] for cell in cells) + 5))
    axes.set_xlabel("compute: GFLOP per problem, policy and PRM together (log scale)")
    axes.set_ylabel("problems solved, % (bars: 95 % interval)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, alpha=0.25)
    sizes = f"\nmark size: n = {', '.join(map(str, budgets))}" if len(budgets) > 1 else ""
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title=f"policy, method{sizes}", title_fontsize=9)
    figure.savefig(file)
