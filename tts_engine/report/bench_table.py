"""What a bench measured, drawn for a terminal and written to files. A row is one case's flat dictionary of plain values."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import EngineError
from .text import figures, harmless, short

Row = dict[str, Any]
Column = tuple[str, list[str]]  # its heading, and a cell a row
Shown = tuple[str, Callable[[Row], str]]  # its heading, and what makes a cell of a row
GAP, WIDEST = 2, 28  # between columns; of one column

# Settings that are columns where rows differ in them, and are told above the table where they do not, those of QUIET left out. Who
# searched how widely is a column always.
SETTINGS = ("policy", "prm", "method", "n", "rules", "width", "problems", "prompt_tokens", "depth", "step_tokens", "load", "dtype",
            "device", "backend", "memory", "kv_bytes", "block_size", "max_rows", "top_k", "top_p", "prm_family", "deterministic",
            "threads", "repeats")  # fmt: skip
ALWAYS = ("method", "n")
QUIET = (*ALWAYS, "memory", "kv_bytes", "max_rows", "top_k", "top_p", "prm_family", "deterministic")


def prm_only(show: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: show(row) if row["prm"] is not None else "-"


JOULES = "joules"  # a column where somebody counts them
FIGURES: list[Shown] = [
    ("problems\n/s", lambda r: figures(r["problems_per_s"])),
    ("policy\ntok/s", lambda r: figures(r["policy_tokens_per_s"])),
    ("PRM\ntok/s", prm_only(lambda r: figures(r["prm_tokens_per_s"]))),
    ("policy\nGFLOP", lambda r: figures(r["policy_flops"] / 1e9)),
    ("PRM\nGFLOP", prm_only(lambda r: figures(r["prm_flops"] / 1e9))),
    ("useful\n%", lambda r: figures(100 * r["useful"])),
    ("MFU\n%", lambda r: figures(100 * r["mfu"])),
    ("MBU\n%", lambda r: figures(100 * r["mbu"])),
    ("tokens\n/PFLOP", lambda r: short(r["tokens_per_pflop"])),
    ("KV MB\ndistinct", lambda r: figures(r["kv_distinct_bytes"] / 1e6)),
    ("KV MB\nlogical", lambda r: figures(r["kv_logical_bytes"] / 1e6)),
    ("peak\nRSS MB", lambda r: figures(r["peak_rss_bytes"] / 1e6)),
    (JOULES, lambda r: "-" if r["joules"] is None else figures(r["joules"])),
    ("seconds\n(least-most)", lambda r: f"{figures(r['seconds'])} ({figures(r['seconds_min'])}-{figures(r['seconds_max'])})"),
]


def columns(rows: Sequence[Row]) -> list[Shown]:
    """The settings that are columns, then the figures."""
    return settings(rows) + told(rows)


def settings(rows: Sequence[Row]) -> list[Shown]:
    varied = [name for name in SETTINGS if name in ALWAYS or len(_values(rows, name)) > 1]
    return [(name.replace("_", "\n"), setting(name)) for name in varied]


def setting(name: str) -> Callable[[Row], str]:
    return lambda row: _told(row[name])


def told(rows: Sequence[Row]) -> list[Shown]:
    return [figure for figure in FIGURES if figure[0] != JOULES or _values(rows, JOULES)]


def caption(rows: Sequence[Row]) -> str:
    """The settings that all rows share, those that matter to most readers."""
    shared = {name: values for name in SETTINGS if name not in QUIET and len(values := _values(rows, name)) == 1}
    return ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, [value] in shared.items())


def ceilings(rows: Sequence[Row]) -> str:
    """What 100 % of MFU and of MBU are."""
    products = sorted({f"{r['dtype']} on {r['device']} {short(r['gemm_flops_per_s'])}FLOP/s" for r in rows})
    copies = sorted({f"{r['device']} {short(r['copy_bytes_per_s'])}B/s" for r in rows})
    sides = sorted({r["gemm_side"] for r in rows})
    measured = f"GEMM ceilings measured now, with square matrices of {' and '.join(map(str, sides))}: {', '.join(products)}"
    return f"{measured}; of copies of memory: {', '.join(copies)}"


def show(rows: Sequence[Row], screen: Console) -> None:
    """All of it on a terminal; as many tables below one another as its width takes, each with the settings that differ."""
    labels, figures = ([(heading, [tell(row) for row in rows]) for heading, tell in part(rows)] for part in (settings, told))
    screen.print(caption(rows), markup=False)
    parts: list[list[Column]] = [[]]
    for figure in figures:
        if parts[-1] and sum(map(_width, [*labels, *parts[-1], figure])) > screen.width:
            parts.append([])
        parts[-1].append(figure)
    for part in parts:
        screen.print()
        screen.print(_table(labels, part))
    screen.print(f"\n{ceilings(rows)}", markup=False)


def _width(column: Column) -> int:
    heading, cells = column
    return min(WIDEST, max(map(len, [*heading.split("\n"), *cells]))) + GAP


def _table(labels: Sequence[Column], figures: Sequence[Column]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
    for i, column in enumerate([*labels, *figures]):
        width = _width(column) - GAP
        drawn.add_column(column[0], justify="left" if i < len(labels) else "right", width=width, vertical="bottom", overflow="fold")
    for row in zip(*(cells for _, cells in [*labels, *figures]), strict=True):
        drawn.add_row(*map(Text, row))
    return drawn


def markdown(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    lines = [[heading.replace("\n", " ") for heading, _ in shown], ["---"] * len(shown)]
    lines += [[show(row).replace("|", "\\|") for _, show in shown] for row in rows]
    drawn = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{caption(rows)}\n\n{drawn}\n{ceilings(rows)}\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """Every value of a row in full; an empty place where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {".md": markdown, ".csv": comma_separated, ".jsonl": json_lines}


def refuse_unless_known(path: Path) -> None:
    """Raise EngineError where the name says no format."""
    if path.suffix not in FORMATS:
        raise EngineError(f"{path} is in no known format; known: {', '.join(FORMATS)}")


def refuse_unless_writable(path: Path) -> None:
    """Raise EngineError where no table could be written there. What a file holds is kept until there is a table."""
    try:
        path.open("a").close()
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def write(rows: Sequence[Row], path: Path) -> None:
    """The table of at least one row in the format that the path's suffix names."""
    path.write_text(FORMATS[path.suffix](rows), encoding="utf-8")


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """What the rows that have such a setting set it to."""
    return list(dict.fromkeys(row[name] for row in rows if row[name] is not None))


def _told(value: Any) -> str:
    return "-" if value is None else harmless(value) if isinstance(value, str) else str(value)
