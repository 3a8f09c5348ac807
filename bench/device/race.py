"""Seconds on a device: contenders take turns within one run, captured as graphs where there is a GPU, their data in no cache."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from .setting import Bench

AGAIN = " (again)"  # the first contender runs twice a round; how far the two differ is the noise
TURNS = 16  # of a contender in one measurement, at least: launches within a graph follow one another, its own launch does not
MEASURED_S = 2e-3  # of one measurement, at least

Turn = Callable[[int], object]  # does the work once, with the data of that turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Median seconds of one turn by contender; `noise` is how far two runs of the first one differ, as a share."""

    seconds: dict[str, float]
    noise: float
    rounds: int

    def ratio(self, name: str) -> float:
        """How many times the first contender's seconds that one takes."""
        return self.seconds[name] / next(iter(self.seconds.values()))


def captured(bench: Bench, turn: Turn, turns: int) -> Callable[[], object]:
    """What does turn(0) to turn(turns - 1) each time it is called: a CUDA graph on a GPU, where nothing may wait for the host."""

    def all_turns() -> None:
        for number in range(turns):
            turn(number)

    if not bench.on_gpu:
        return all_turns
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        all_turns()  # kernels are compiled and libraries find their workspaces before anything is recorded
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_turns()
    return graph.replay


def seconds_of(bench: Bench, run: Callable[[], object], times: int = 1) -> float:
    """Of one of so many calls, one after the other: by the device's own clock where it has one."""
    if not bench.on_gpu:
        began = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - began) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / times


def race(bench: Bench, contenders: dict[str, Turn], *, turns: int = 1) -> Times:
    """The contenders' seconds a turn; each is captured with so many turns, or TURNS if these are more.

    turns: how many turns pass before data comes again, so that nobody finds its data in a cache. The first contender is ours.
    """
    per_call = turns * math.ceil(TURNS / turns) if bench.on_gpu else turns
    runs = {name: captured(bench, turn, per_call) for name, turn in contenders.items()}
    return raced(bench, runs, per_call)


def raced(bench: Bench, runs: dict[str, Callable[[], object]], turns: int = 1, *, slow: bool = False) -> Times:
    """The same for what is called as it is and does so many turns. slow: one call is a measurement, and there is no rehearsal."""
    ours = next(iter(runs))
    runs = runs | {ours + AGAIN: runs[ours]}
    repeats = dict.fromkeys(runs, 1)
    if bench.on_gpu and not slow:
        repeats = {name: max(1, math.ceil(MEASURED_S / max(seconds_of(bench, run), 1e-6))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.monotonic(), 0
    while rounds < bench.sizes.rounds or (not slow and time.monotonic() - began < bench.sizes.seconds):
        if rounds and bench.time_left < (time.monotonic() - began) / rounds:
            break  # another round would not end in time
        for name in list(runs) if rounds % 2 == 0 else reversed(runs):
            seconds[name].append(seconds_of(bench, runs[name], repeats[name]) / turns)
        rounds += 1
    medians = {name: median(measured) for name, measured in seconds.items()}
    again = medians.pop(ours + AGAIN)
    return Times(seconds=medians, noise=abs(again / medians[ours] - 1), rounds=rounds)


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second that are read and written when memory is copied."""
    count = bench.sizes.copied // 4
    source = torch.randn(count, generator=bench.generator(), device=bench.device)
    target = torch.empty_like(source)
    seconds = race(bench, {"copy": lambda _: target.copy_(source)}).seconds["copy"]
    bandwidth = 2 * source.nbytes / seconds
    bench.row("copy", ms=1e3 * seconds, tb_per_s=bandwidth / 1e12)
    return bandwidth


def product_rate(bench: Bench) -> float:
    """FLOP/s of one large matrix product."""
    side, gen = bench.sizes.side, bench.generator()
    a, b = (torch.randn(side, side, generator=gen, device=bench.device).to(bench.sizes.dtype) for _ in "ab")
    seconds = race(bench, {"product": lambda _: torch.mm(a, b)}).seconds["product"]
    rate = 2 * side**3 / seconds
    bench.row(f"product {side}", ms=1e3 * seconds, tflop_per_s=rate / 1e12)
    return rate
