"""How far a run is: a bar on a terminal, one plain line every ten seconds elsewhere. On standard error, never standard output."""

import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from .intervals import wilson
from .text import clock, percent

LINE_EVERY_S = 10.0


class Progress:
    """Counts the records of `total` problems as they finish, those of earlier sessions apart: they say nothing about time left."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.finished, self.earlier = total, 0, 0
        self.label, self.solved, self.tried = "", 0, 0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._bar: Any = None
        self._reporter = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> Self:
        if self.stream.isatty():
            self._bar = self._make_bar()
            self._task = self._bar.add_task("", total=self.total, state="")
            self._bar.start()
        else:
            self._reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._reporter.join()

    def begin(self, label: str, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Name what runs now, with what is finished of it already; its accuracy is counted anew."""
        self.label, self.tried = label, len(earlier)
        self.solved = sum(bool(record["correct"]) for record in earlier)
        self.finished += len(earlier)
        self.earlier += len(earlier)
        self._show()

    def advance(self, record: dict[str, Any]) -> None:
        """One more problem is done."""
        self.finished += 1
        self.tried += 1
        self.solved += bool(record["correct"])
        self._show()

    @property
    def accuracy(self) -> str:
        """Of what runs now, in words."""
        if not self.tried:
            return ""
        return f"{percent(self.solved / self.tried, wilson(self.solved, self.tried))} % correct"

    def line(self) -> str:
        passed = time.monotonic() - self._started
        now = self.finished - self.earlier
        left = clock(passed / now * (self.total - self.finished)) if now else "?"
        parts = [self.label, f"{self.finished} of {self.total} problems", self.accuracy, f"{clock(passed)} passed, {left} left"]
        return ", ".join(part for part in parts if part)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, description=self.label, state=self.accuracy)

    def _report(self) -> None:
        while not self._over.wait(LINE_EVERY_S):
            print(self.line(), file=self.stream, flush=True)

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        return Bar(*columns, console=Console(file=self.stream), transient=True)
