"""Races: contenders take turns within one run, so that what else the machine does slows all of them alike."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

SECONDS = 2.0  # of one race
LEAST_ROUNDS = 7
AGAIN = " (again)"  # the first contender runs twice a round; how far the two differ is the noise
_TABLES: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--save", metavar="NAME", help="write the tables to bench/results/NAME.json")
    parser.addoption("--layers", type=int, default=1, help="of 24: the slice of a model that test_search.py runs")
    parser.addoption("--long", action="store_true", help="also the cases of test_search.py that take many minutes")
    parser.addoption("--turns", type=int, default=3, help="how often each contender runs where a run takes long")


@pytest.fixture
def tell(request):
    """tell(case, **columns): a row of the table that is no race."""
    subject = request.module.__name__.removeprefix("test_")
    return lambda case, **columns: _TABLES.setdefault(subject, []).append({"case": case} | columns)


@pytest.fixture
def race(request):
    """race(case, contenders, gflop=, gbyte=): median seconds by contender; the first one is ours, the others are set against it.

    slow: exactly as many rounds as --turns says, none of them a rehearsal. columns: from what a contender returned last and its
    seconds, further columns of its row.
    """
    turns = request.config.getoption("--turns")
    subject = request.module.__name__.removeprefix("test_")

    def run(case: str, contenders: dict[str, Callable[[], object]], *, gflop: float = 0.0, gbyte: float = 0.0, slow: bool = False,
            columns: Callable[[Any, float], dict[str, object]] | None = None) -> dict[str, float]:  # fmt: skip
        ours = next(iter(contenders))
        runners = [*contenders.items(), (ours + AGAIN, contenders[ours])]
        times: dict[str, list[float]] = {name: [] for name, _ in runners}
        returned: dict[str, object] = {}
        for _, runner in [] if slow else runners:
            runner()
        started, rounds = time.perf_counter(), 0
        while rounds < turns if slow else rounds < LEAST_ROUNDS or time.perf_counter() - started < SECONDS:
            for i in range(len(runners)):
                name, runner = runners[(i + rounds) % len(runners)]
                began = time.perf_counter()
                returned[name] = runner()
                times[name].append(time.perf_counter() - began)
            rounds += 1
        medians = {name: median(seconds) for name, seconds in times.items()}
        for name, seconds in medians.items():
            row = {"case": case, "contender": name, "ms": 1e3 * seconds, "times ours": seconds / medians[ours], "rounds": rounds}
            row |= {"GFLOP/s": gflop / seconds} if gflop else {}
            row |= {"GB/s": gbyte / seconds} if gbyte else {}
            row |= columns(returned[name], seconds) if columns is not None else {}
            _TABLES.setdefault(subject, []).append(row)
        return medians

    return run


def pytest_terminal_summary(terminalreporter, config):
    for subject, rows in _TABLES.items():
        terminalreporter.write_sep("-", subject)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [columns, *([_told(row.get(column, "")) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    name = config.getoption("--save")
    if name and _TABLES:
        path = Path(__file__).parent / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        machine = {"cpu": _cpu(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                   "python": platform.python_version(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
        path.write_text(json.dumps({"machine": machine, "tables": _TABLES}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {path}")


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
