"""A strategy's tables for a terminal, as its file has them: what was picked for whom, and how well difficulty is predicted."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .text import figures, percent


def pick_table(table: dict[str, Any]) -> Table:
    """One line a budget and bin: the method, and what it gave on calibration problems."""
    fitted, models = table["fitted_on"], " with ".join(table[part]["name"] for part in ("policy", "prm") if table[part])
    told = f": {fitted['problems']} {fitted['split']} problems of {fitted['task']}" if fitted else ""
    drawn = _table(f"{models or 'any policy'}{told}", ["n", "bin", "problems", "method", "accuracy %", "GFLOP a problem", "of"])
    for pick in table["picks"]:
        method, bins = pick["method"], table["bins"]
        own = f"{method['name']}" + (f" n={method['n']}" if "n" in method else "")
        where = ["any" if pick["n"] is None else str(pick["n"]), pick["bin"] or ", ".join(bins["names"])]
        cells = [*where, _count(pick["problems"]), own,
                 "-" if pick["accuracy"] is None else percent(pick["accuracy"]),
                 "-" if pick["gflop"] is None else figures(pick["gflop"]), _count(pick["compared"])]  # fmt: skip
        drawn.add_row(*map(Text, cells))
    return drawn


def confusion_table(table: dict[str, Any]) -> Table:
    """Problems of each known bin (down) by predicted bin (across)."""
    names, confusion = table["bins"]["names"], table["predictor"]["confusion"]
    right = sum(confusion[name][name] for name in names)
    total = sum(sum(row.values()) for row in confusion.values())
    title = (
        f"predicted by {table['predictor']['draws']} draws, each problem by the others: {percent(right / max(total, 1))} % right"
    )
    drawn = _table(title, ["known", *names])
    for name in names:
        drawn.add_row(Text(name), *(Text(str(confusion[name][other])) for other in names))
    return drawn


def _table(title: str, headings: list[str]) -> Table:
    drawn = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading in ("bin", "method", "known") else "right", no_wrap=True)
    return drawn


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)
