"""Straight-line integer programs: the problems of the embedded task, their worked solutions and exact step labels.

A problem reads `a=47+38;b=6*9;c=a-b;d=c*7;d?`; a solution writes one operation a step, in any valid order, operands
restated (`c=85-54=31`), and ends in `\\boxed{217}`. Knows text and integers only; every draw comes from the generator passed in.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

LIMIT = 9999  # no value of a valid program exceeds this in magnitude
STEP_END = "\n\n"
OPERATIONS_BY_LEVEL = {1: (2, 3), 2: (3, 5), 3: (5, 8)}  # fewest and most operations, inclusive
# A program belongs to one split for ever: the range, out of 100, that the hash of its canonical form falls in.
HASH_RANGES = {"test": (0, 10), "calibration": (10, 20), "prm_dev": (20, 30), "train": (30, 100)}
SPLIT_SIZES = {"test": 600, "calibration": 600, "prm_dev": 1000}

_STEP = re.compile(r"([a-h])=(-?\d{1,6})([-+*/%])(-?\d{1,6})=(-?\d{1,6})")
_BOXED = re.compile(r"\\boxed\{(-?\d{1,6})\}")


@dataclass(frozen=True, slots=True)
class Operation:
    """`target = left op right`; an operand is an earlier target's letter or a literal integer."""

    target: str
    left: str | int
    op: str
    right: str | int


@dataclass(frozen=True)
class Program:
    """Operations in definition order; the last target is what the problem asks for."""

    operations: tuple[Operation, ...]
    level: int

    @cached_property
    def values(self) -> dict[str, int]:
        values = _finish(self.operations, {})
        assert values is not None, "a program divides by zero"
        return values

    @property
    def answer(self) -> int:
        return self.values[self.operations[-1].target]

    @property
    def text(self) -> str:
        lines = [f"{o.target}={o.left}{o.op}{o.right}" for o in self.operations]
        return ";".join(lines) + f";{self.operations[-1].target}?"

    @cached_property
    def canonical(self) -> str:
        """The program as one expression without names, commutative operands sorted: equal where only the spelling differs."""
        expressions: dict[str, str] = {}
        for o in self.operations:
            left, right = (expressions[x] if isinstance(x, str) else str(x) for x in (o.left, o.right))
            if o.op in "+*" and right < left:
                left, right = right, left
            expressions[o.target] = f"({left}{o.op}{right})"
        return expressions[self.operations[-1].target]

    @property
    def split(self) -> str:
        bucket = int.from_bytes(hashlib.sha256(self.canonical.encode()).digest()[:8], "big") % 100
        return next(name for name, (low, high) in HASH_RANGES.items() if low <= bucket < high)


def apply(left: int, op: str, right: int) -> int | None:
    """The value of one operation, None where it has none (division by zero). `/` and `%` round towards minus infinity."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if right == 0:
        return None
    return left // right if op == "/" else left % right


def solve(program: Program, rng: random.Random) -> list[str]:
    """One correct solution as step texts (without the blank lines between them), in a random valid order."""
    pending = list(program.operations)
    values: dict[str, int] = {}
    steps = []
    while pending:
        ready = [o for o in pending if all(x in values for x in (o.left, o.right) if isinstance(x, str))]
        chosen = ready[rng.randrange(len(ready))]
        pending.remove(chosen)
        left, right = (values[x] if isinstance(x, str) else x for x in (chosen.left, chosen.right))
        values[chosen.target] = program.values[chosen.target]
        steps.append(f"{chosen.target}={left}{chosen.op}{right}={values[chosen.target]}")
    return [*steps, rf"\boxed{{{program.answer}}}"]


def step_labels(program: Program, steps: list[str]) -> list[bool]:
    """For each step: can the right final answer still be reached by finishing correctly from what has been stated so far?

    A malformed step, one that restates a variable or uses one that is not known yet, ends all hope. Exact, from the program.
    """
    by_target = {o.target: o for o in program.operations}
    stated: dict[str, int] = {}
    labels: list[bool] = []
    for step in steps:
        if labels and not labels[-1]:
            labels.append(False)  # what is stated stays stated: hope never comes back
            continue
        boxed, line = _BOXED.fullmatch(step), _STEP.fullmatch(step)
        if boxed:
            labels.append(int(boxed[1]) == program.answer)
        elif line and line[1] in by_target and line[1] not in stated and _known(by_target[line[1]], stated):
            stated[line[1]] = int(line[5])
            final = _finish(program.operations, stated)
            labels.append(final is not None and final[program.operations[-1].target] == program.answer)
        else:
            labels.append(False)
    return labels


def stated_operation(step: str) -> tuple[int, str, int, int] | None:
    """(left, operator, right, stated result) of a step, None for one of another form."""
    line = _STEP.fullmatch(step)
    return (int(line[2]), line[3], int(line[4]), int(line[5])) if line else None


def draw_program(level: int, rng: random.Random) -> Program:
    """A random program of `level`: every target but the last is used exactly once, every |value| <= LIMIT."""
    fewest, most = OPERATIONS_BY_LEVEL[level]
    while True:
        program = _try_program(rng.randint(fewest, most), level, rng)
        if program is not None:
            return program


def draw_programs(split: str, level: int, rng: random.Random) -> Iterator[Program]:
    """Endless programs of one level that belong to `split`."""
    while True:
        program = draw_program(level, rng)
        if program.split == split:
            yield program


def split_programs(split: str) -> list[Program]:
    """The fixed, distinct programs of a held-out split (`test`, `calibration`, `prm_dev`), levels interleaved 1, 2, 3, 1, ..."""
    streams = {level: draw_programs(split, level, random.Random(f"{split}/{level}")) for level in OPERATIONS_BY_LEVEL}
    programs: dict[str, Program] = {}
    while len(programs) < SPLIT_SIZES[split]:
        stream = streams[1 + len(programs) % len(streams)]
        program = next(p for p in stream if p.canonical not in programs)
        programs[program.canonical] = program
    return list(programs.values())


def _known(operation: Operation, stated: dict[str, int]) -> bool:
    return all(x in stated for x in (operation.left, operation.right) if isinstance(x, str))


def _finish(operations: tuple[Operation, ...], stated: dict[str, int]) -> dict[str, int] | None:
    """All values when what is not yet stated is computed correctly from what is; None where that is impossible."""
    values = dict(stated)
    for o in operations:
        if o.target not in values:
            left, right = (values[x] if isinstance(x, str) else x for x in (o.left, o.right))
            value = apply(left, o.op, right)
            if value is None:
                return None
            values[o.target] = value
    return values


def _try_program(num_operations: int, level: int, rng: random.Random) -> Program | None:
    operations: list[Operation] = []
    values: dict[str, int] = {}
    unused: list[str] = []
    for index in range(num_operations):
        later = num_operations - index - 1
        # Each later operation joins at most two unused targets into one, and one must be left at the end.
        takes = [k for k in (0, 1, 2) if k <= len(unused) and 1 <= len(unused) - k + 1 <= later + 1]
        taken = rng.sample(unused, rng.choice(takes))
        target = "abcdefgh"[index]
        made = _draw_operation(target, taken, values, rng)
        if made is None:
            return None
        operation, value = made
        operations.append(operation)
        values[target] = value
        unused = [name for name in unused if name not in taken] + [target]
    return Program(tuple(operations), level)


def _draw_operation(target: str, taken: list[str], values: dict[str, int], rng: random.Random) -> tuple[Operation, int] | None:
    for _ in range(20):
        op = rng.choice("++--**/%")
        names: list[str | int] = [*taken]
        while len(names) < 2:
            names.append(_draw_literal(op, len(names), values[taken[0]] if taken else None, rng))
        if taken and rng.random() < 0.3:
            names.reverse()
        left, right = (values[x] if isinstance(x, str) else x for x in names)
        if _allowed(left, op, right):
            value = apply(left, op, right)
            if value is not None and abs(value) <= LIMIT:
                return Operation(target, names[0], op, names[1]), value
    return None


def _draw_literal(op: str, position: int, other: int | None, rng: random.Random) -> int:
    if op == "/" and position == 1 and other is not None and other > 1:
        divisors = [d for d in range(2, 100) if other % d == 0]
        return rng.choice(divisors) if divisors else 0
    if op == "/" and position == 0:
        return rng.randint(2, 99) * rng.randint(2, 9)
    digits = rng.randint(1, 3) if op in "+-" or (op == "%" and position == 0) else rng.randint(1, 2)
    return rng.randint(2 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _allowed(left: int, op: str, right: int) -> bool:
    if op in "+-":
        return abs(left) <= 999 and abs(right) <= 999
    if op == "*":
        return abs(left) <= 99 and abs(right) <= 99
    if op == "/":
        return left > 0 and 2 <= right <= 99 and left % right == 0
    return 0 < left <= 999 and 2 <= right <= 99
