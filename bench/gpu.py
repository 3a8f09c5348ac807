"""One command for a bare GPU machine: is everything right there, and how fast is it?  `python bench/gpu.py [part ...]`

Needs torch, triton, transformers and, to build the extension where it is missing, pybind11 and a compiler; no network, no
installation. First come the checks, side by side, then the races, which have the machine to themselves; in at most eight minutes
whatever happens. Parts run in processes of their own: what fails, hangs or takes the device down costs the others nothing. At the
end one table on the screen and one JSON file, bench/results/DEVICE-all.json or, of chosen parts, DEVICE-PART-PART.json. The exit
status is 0 where every part passed, 1 where one did not; a figure that is not reached fails nothing.
"""

import argparse
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # for this folder, which is a room of it

from bench.device.figures import FIGURES  # noqa: E402
from bench.device.parts import PARTS  # noqa: E402
from bench.device.worker import BROKEN  # noqa: E402
from tts_engine.report.versions import package_version  # noqa: E402

RESULTS = ROOT / "bench" / "results"
COMMAND = [sys.executable, "-m", "bench.device.worker"]
BUDGET = 470.0  # seconds for everything
START = 150.0  # until a process has imported what it needs
GRACE = 10.0  # beyond its own time, for a part that is at its last round
ASKED = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
PACKAGES = ("torch", "triton", "transformers", "numpy")
LINES, SHOWN = 12, 8  # lines of a traceback, and failed checks, that are shown at the end; the JSON has all of them


@dataclass
class Report:
    """All that was found."""

    machine: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: seconds, error, clocks
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    failed_checks: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        event = dict(event)
        kind = event.pop("event")
        if kind == "end":
            self.parts.setdefault(event["part"], {}).update(seconds=event["seconds"], error=event["error"])
        elif kind != "begin":
            {"row": self.rows, "figure": self.figures, "failed check": self.failed_checks}[kind].append(event)
        print(_line(kind, event), flush=True)

    def fail(self, part: str, why: str) -> None:
        self.take({"event": "end", "part": part, "seconds": None, "error": why})

    @property
    def failed(self) -> list[str]:
        return [name for name, part in self.parts.items() if part["error"] is not None]


class Worker:
    """A process with some parts, and a thread that hears what it says."""

    def __init__(self, parts: Mapping[str, float], device: str, sizes: str, directory: Path, until: float,
                 heard: queue.Queue) -> None:  # fmt: skip
        self.waiting = list(parts)  # parts that have not ended; the first may have begun
        reads, writes = os.pipe()
        settings = {"parts": dict(parts), "device": device, "sizes": sizes, "directory": str(directory), "events": writes,
                    "until": until}  # fmt: skip
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen([*COMMAND, json.dumps(settings)], cwd=ROOT, pass_fds=[writes], stdout=self._log,
                                        stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        os.close(writes)
        threading.Thread(target=self._hear, args=(reads, heard), daemon=True).start()

    def _hear(self, reads: int, heard: queue.Queue) -> None:
        with os.fdopen(reads) as lines:
            for line in lines:
                heard.put((self, json.loads(line)))
        heard.put((self, None))  # it is gone

    def end(self) -> int:
        """Its exit status; nothing that it has started goes on, nor does itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def said(self) -> str:
        """The end of what it wrote to its screen."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode("utf-8", "replace").splitlines()[-LINES:])


def work(groups: Sequence[Mapping[str, float]], report: Report, device: str, sizes: str, directory: Path, deadline: float) -> None:
    """Run groups of parts side by side, the parts of a group one after the other; who is not done in its time is ended."""
    heard: queue.Queue = queue.Queue()
    limits: dict[Worker, float] = {}  # when each is to be ended; inf once it was

    def start(parts: Mapping[str, float]) -> None:
        limits[Worker(parts, device, sizes, directory, deadline - GRACE, heard)] = min(deadline, time.monotonic() + START)

    for group in groups:
        if group:
            start(group)
    seconds = {name: limit for group in groups for name, limit in group.items()}
    try:
        while limits:
            for worker in [worker for worker, limit in limits.items() if time.monotonic() > limit]:
                limits[worker] = float("inf")
                worker.end()
            try:
                worker, event = heard.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is not None:
                report.take(event)
                if event["event"] == "begin":
                    limits[worker] = min(deadline, time.monotonic() + seconds[event["part"]] + GRACE)
                    report.parts[event["part"]] = {"seconds": None, "error": "it did not end", "clocks": [asked()]}
                elif event["event"] == "end":
                    worker.waiting.remove(event["part"])
                    report.parts[event["part"]]["clocks"].append(asked())
                continue
            late, status = limits.pop(worker) == float("inf"), worker.end()
            if worker.waiting and status != BROKEN:
                why = "it was ended: out of time" if late else f"its process ended with status {status}"
                report.fail(worker.waiting.pop(0), f"{why}\n{worker.said()}")
            if worker.waiting and time.monotonic() < deadline:
                start({name: seconds[name] for name in worker.waiting})
            else:
                for name in worker.waiting:
                    report.fail(name, "no time was left for it")
    finally:
        for worker in limits:
            worker.end()


def asked() -> list[str] | None:
    """What nvidia-smi says of ASKED; None where it says nothing."""
    try:
        said = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"], check=True, text=True,
                              capture_output=True, timeout=10).stdout  # fmt: skip
        return [part.strip() for part in said.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def describe(device: Sequence[str]) -> dict[str, Any]:
    return {
        "gpu": device[0],
        "driver": device[1],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    } | {package: package_version(package) for package in PACKAGES}


def build() -> float:
    """Seconds that it took to build the extension; 0 where it is there."""
    if util.find_spec("tts_engine._C") is not None:
        return 0.0
    began = time.monotonic()
    print("building the extension", flush=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    return time.monotonic() - began


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args(argv).parts
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    device = asked()
    if device is None:
        print("bench/gpu.py needs an NVIDIA GPU, and nvidia-smi tells of none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + BUDGET
    report = Report(describe(device))
    report.machine["build_s"] = build()
    names = [name for name in PARTS if name in (chosen or PARTS)]
    with tempfile.TemporaryDirectory() as directory:
        seconds = {name: BUDGET if chosen else PARTS[name].seconds for name in names}
        everything(seconds, report, "cuda", "full", Path(directory), deadline)
    path = RESULTS / f"{device[0].split(' ', 1)[-1].lower().replace(' ', '-')}-{'-'.join(chosen) or 'all'}.json"
    write(report, path)
    show(report)
    print(f"written to {path}")
    return 1 if report.failed else 0


def everything(seconds: Mapping[str, float], report: Report, device: str, sizes: str, directory: Path, deadline: float) -> None:
    """The checks side by side, then the races in one process. seconds: by part, what it may take."""
    checks = [{name: limit} for name, limit in seconds.items() if not PARTS[name].timed]
    races = {name: limit for name, limit in seconds.items() if PARTS[name].timed}
    for groups in (checks, [races]):
        work(groups, report, device, sizes, directory, deadline)


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    told = {"machine": report.machine, "parts": report.parts, "figures": report.figures, "rows": report.rows,
            "failed checks": report.failed_checks}  # fmt: skip
    path.write_text(json.dumps(told, indent=1) + "\n")


def show(report: Report) -> None:
    """Why parts failed, then one table of all figures and parts."""
    for check in report.failed_checks[:SHOWN]:
        print(f"\nfailed check: {check['part']}, {check['case']}\n{_end(check['error'])}")
    for name in report.failed:
        print(f"\nfailed part: {name}\n{_end(report.parts[name]['error'])}")
    lines = [["figure", "case", "measured", "at least", "aim", "noise", ""]]
    for found in report.figures:
        figure = FIGURES[found["name"]]
        bounds = [f"{'<= ' if figure.most else ''}{bound:g} {figure.unit}" for bound in (figure.least, figure.aim)]
        noise = f"{100 * found['noise']:.1f} %" if "noise" in found else ""
        verdict = figure.verdict(found["value"]) if found.get("meaningful", True) else "means nothing: the blind kernel is slow"
        lines.append([figure.what, found["case"], f"{found['value']:.3g} {figure.unit}", *bounds, noise, verdict])
    for name, part in report.parts.items():
        took = "" if part["seconds"] is None else f"{part['seconds']:.0f} s"
        lines.append([f"part {name}", "", took, "", "", "", "passed" if part["error"] is None else "FAILED"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _line(kind: str, event: dict[str, Any]) -> str:
    shown = {key: value for key, value in event.items() if key not in ("part", "case", "error", "clocks")}
    told = "  ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in shown.items())
    outcome = "" if kind != "end" else "passed" if event["error"] is None else "FAILED"
    return f"[{event['part']}] {kind}: {event.get('case', outcome)}  {told}".rstrip()


def _end(error: str) -> str:
    return "\n".join(error.strip().splitlines()[-LINES:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
