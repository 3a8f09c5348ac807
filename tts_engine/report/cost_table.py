"""What the cells of a sweep would cost, for a terminal."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .text import figures, harmless, short

COUNTS = ("policy_flops", "prm_flops", "kv_bytes", "kv_logical_bytes", "weight_bytes")
COLUMNS = [("method", 16), ("made", 8), ("policy\nFLOPs", 7), ("PRM\nFLOPs", 7), ("KV bytes\na problem", 9),
           ("were none\nshared", 9), ("bytes of\nweights", 8), ("H200s", 5), ("H200\nhours", 7)]  # fmt: skip


def cost_tables(costs: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each policy and PRM, all of one width, headings over the first."""
    for number, (models, cells) in enumerate(groupby(costs, key=lambda cost: (cost["policy"], cost["prm"]))):
        title = " with ".join(Path(name).name for name in models if name is not None)
        drawn = Table(title=Text(harmless(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                      show_edge=False, show_header=number == 0)  # fmt: skip
        for i, (heading, width) in enumerate(COLUMNS):
            drawn.add_column(heading, justify="left" if i < 2 else "right", width=width, vertical="bottom")
        for cost in cells:
            method = cost["method"] if cost["method"] == "cot" else f"{cost['method']} n={cost['n']}"
            counts = [short(cost[name]) if cost[name] else "-" for name in COUNTS]
            drawn.add_row(method, cost["made"], *counts, str(cost["gpus"]), figures(cost["hours"]))
        yield drawn
