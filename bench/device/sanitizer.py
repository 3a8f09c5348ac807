"""compute-sanitizer over the checks of kernels, where it is installed."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from .setting import Bench
from .worker import ROOT

PARTS_CHECKED = ("kernels", "tiles-bf16")
FOUND = 9  # exit status of the tool where it found something
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def sanitizer(bench: Bench, name: str) -> None:
    """One of its tools: memcheck, racecheck."""
    tool = next(filter(None, map(shutil.which, PLACES)), None)
    if tool is None:
        bench.row(name, missing="compute-sanitizer is not on the PATH")
        return
    bench.check(name, partial(_clean, bench, tool, name))
    bench.settle()


def _clean(bench: Bench, tool: str, name: str) -> dict[str, int]:
    """Raise AssertionError with what the tool said where it found anything; the number of checks that ran under it."""
    events = bench.directory / f"{name}.jsonl"
    with events.open("w") as file:
        settings = {"parts": dict.fromkeys(PARTS_CHECKED, bench.time_left), "device": str(bench.device), "sizes": "sanitized",
                    "directory": str(bench.directory), "events": file.fileno()}  # fmt: skip
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "5",
                   sys.executable, "-m", "bench.device.worker", json.dumps(settings)]  # fmt: skip
        # Memory that a cache hands out has no edges that the tool could see.
        environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {})
        done = subprocess.run(command, cwd=ROOT, env=environment, pass_fds=[file.fileno()], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=max(1.0, bench.time_left))  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-2000:]}"
    told = [json.loads(line) for line in Path(events).read_text().splitlines()]
    errors = [event["error"] for event in told if event["event"] == "end"]
    assert errors == [None] * len(PARTS_CHECKED), f"{len(errors)} parts ended, with {errors}"
    return {"checks": sum(event["event"] == "row" for event in told)}
