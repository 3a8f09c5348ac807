"""The parts of bench/gpu.py, in the order in which they run and are told."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    run: str  # "file of this room:function"; a part whose file cannot be imported fails alone
    given: tuple[str, ...] = ()  # to the function, behind the bench
    seconds: float  # it may take where all of them run; chosen ones have what time there is
    timed: bool  # has the machine to itself; the others run side by side


PARTS = {
    "tiles-bf16": Part(run="plans:tiles", given=("bfloat16",), seconds=120, timed=False),
    "tiles-fp16": Part(run="plans:tiles", given=("float16",), seconds=120, timed=False),
    "tiles-fp32": Part(run="plans:tiles", given=("float32",), seconds=120, timed=False),
    "replay": Part(run="plans:replay", seconds=100, timed=False),
    "kernels": Part(run="kernels:kernels", seconds=120, timed=False),
    "large": Part(run="kernels:large", seconds=60, timed=False),
    "models": Part(run="models:models", seconds=120, timed=False),
    "batch": Part(run="models:batch", seconds=100, timed=False),
    "ticks": Part(run="models:ticks", seconds=100, timed=False),
    "demo": Part(run="models:demo", seconds=100, timed=False),
    "eval": Part(run="models:evaluation", seconds=120, timed=False),
    "memcheck": Part(run="sanitizer:sanitizer", given=("memcheck",), seconds=120, timed=False),
    "racecheck": Part(run="sanitizer:sanitizer", given=("racecheck",), seconds=120, timed=False),
    "attention": Part(run="attention:attention", seconds=60, timed=True),
    "levels": Part(run="attention:levels", seconds=30, timed=True),
    "tick": Part(run="decode:tick", seconds=45, timed=True),
    "prm": Part(run="prm:prm", seconds=75, timed=True),
    "search": Part(run="decode:search", seconds=150, timed=True),
}
