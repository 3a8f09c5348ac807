"""Token batches for training: problems with worked solutions, and labelled trajectories, as padded rows of similar length."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..prm.spec import PRMSpec
from ..tasks.programs import LIMIT, STEP_END, Program, apply, draw_programs, solve, stated_operation, step_labels
from .recipe import LEVEL_MIX, MOST_SLIPS, SLIP_RATE

IGNORE = -100
FIRST_ERROR, GOOD, LATER_ERROR = 0, 1, 2  # what a step is to a PRM in training
WRONG_DIGIT, RIGHT_DIGIT = 3, 4  # what a character of a step's result is, up to the first wrong one
LENGTH_MULTIPLE = 32  # few distinct shapes, so that a compiled model is compiled few times


def training_programs(seed: int) -> Iterator[Program]:
    """Endless programs of the training split, levels mixed."""
    rng = random.Random(seed)
    streams = {level: draw_programs("train", level, rng) for level in LEVEL_MIX}
    levels, weights = zip(*LEVEL_MIX.items(), strict=True)
    while True:
        yield next(streams[rng.choices(levels, weights)[0]])


def solved_rows(tokenizer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(input ids, targets) of endless training solutions; a target is IGNORE where the problem is being read."""
    end = tokenizer.token_to_id("<|endoftext|>")
    rng = random.Random(f"solutions/{seed}")
    for program in training_programs(seed):
        prompt = tokenizer.encode(program.text + "\n").ids
        solution = [*tokenizer.encode(STEP_END.join(solve(program, rng))).ids, end]
        ids = prompt + solution
        yield ids[:-1], [IGNORE] * (len(prompt) - 1) + solution


def checked_rows(tokenizer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """As solved_rows, of the same problems; every result is checked behind it, and a wrong one is redone:

        c=85-54=41 (41+54=95 no) =31 (31+54=85 ok)

    A wrong result is read and not learned, so a policy takes from it what to do about mistakes, not to make them.
    """
    end = tokenizer.token_to_id("<|endoftext|>")
    rng = random.Random(f"checked/{seed}")
    for program in training_programs(seed):
        ids = tokenizer.encode(program.text + "\n").ids
        targets = [IGNORE] * len(ids)
        for text, learned in checked_solution(program, rng):
            piece = tokenizer.encode(text).ids
            ids += piece
            targets += piece if learned else [IGNORE] * len(piece)
        yield ids, [*targets[1:], end]


def checked_solution(program: Program, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """The text of a solution in pieces, and whether each is to be learned."""
    for step in solve(program, rng):
        operation = stated_operation(step)
        if operation is None:
            yield step, True
            return
        left, op, right, value = operation
        yield step.rpartition("=")[0], True
        for attempt in range(MOST_SLIPS + 1):
            slips = attempt < MOST_SLIPS and rng.random() < SLIP_RATE
            stated = _slip(value, rng) if slips else value
            yield "=", True
            yield f"{stated} ", not slips
            yield f"({proof(left, op, right, stated)} {'no) ' if slips else 'ok)'}", True
            if not slips:
                break
        yield STEP_END, True


def proof(left: int, op: str, right: int, stated: int) -> str:
    """Another way to what `stated` stands for: a product by parts, anything else taken back to `left`."""
    if op == "+":
        return f"{stated}-{right}={stated - right}"
    if op == "-":
        return f"{stated}+{right}={stated + right}"
    if op == "/":
        return f"{stated}*{right}={stated * right}"
    if op == "%":
        return f"{left // right}*{right}+{stated}={left // right * right + stated}"
    parted, whole = (left, right) if abs(left) > 9 else (right, left)
    ones = abs(parted) % 10 * (1 if parted > 0 else -1)
    return f"{(parted - ones) * whole}+{ones * whole}={left * right}"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A solution, right or wrong, step by step without blank lines, and what each step is: FIRST_ERROR, GOOD or LATER_ERROR."""

    problem: str
    steps: tuple[str, ...]
    kinds: tuple[int, ...]


def labelled(program: Program, steps: Iterable[str]) -> Trajectory:
    """A solution with its exact labels."""
    steps = tuple(steps)
    labels = step_labels(program, list(steps))
    first = labels.index(False) if False in labels else len(labels)
    kinds = (GOOD if label else FIRST_ERROR if i == first else LATER_ERROR for i, label in enumerate(labels))
    return Trajectory(program.text, steps, tuple(kinds))


def arithmetic_drill(seed: int) -> Iterator[Trajectory]:
    """Endless solutions in which every second result is wrong, whatever follows is computed from it, and each step is judged by
    its own arithmetic alone: many right and wrong results a row, of all operations, where samples hold one first error."""
    rng = random.Random(f"drill/{seed}")
    for program in training_programs(seed):
        values: dict[str, int] = {}
        steps, kinds = [], []
        for operation in program.operations:
            left, right = (values[x] if isinstance(x, str) else x for x in (operation.left, operation.right))
            value = apply(left, operation.op, right)
            if value is None or abs(value) > LIMIT:
                break
            stated = value if rng.random() < 0.5 else _slip(value, rng)
            values[operation.target] = stated
            steps.append(f"{operation.target}={left}{operation.op}{right}={stated}")
            kinds.append(GOOD if stated == value else FIRST_ERROR)
        if steps:
            yield Trajectory(program.text, tuple(steps), tuple(kinds))


def _slip(value: int, rng: random.Random) -> int:
    """Another number a small mistake away: a digit, a carry or the sign."""
    place = 10 ** rng.randrange(len(str(abs(value))))
    slips = [value + place, value - place, value + rng.randint(2, 8) * place * rng.choice((-1, 1)), -value]
    slipped = rng.choices(slips, (4, 4, 4, 1))[0]
    return slipped if slipped != value else value + place


def corrupted_gold(seed: int) -> Iterator[Trajectory]:
    """Endless level-1 solutions, every second one with a single digit replaced: all that the poor PRM ever sees."""
    rng = random.Random(f"corrupted/{seed}")
    for number, program in enumerate(draw_programs("train", 1, rng)):
        steps = solve(program, rng)
        if number % 2:
            digits = [(i, j) for i, step in enumerate(steps) for j, c in enumerate(step) if c.isdigit()]
            i, j = digits[rng.randrange(len(digits))]
            other = rng.choice([d for d in "0123456789" if d != steps[i][j]])
            steps[i] = steps[i][:j] + other + steps[i][j + 1 :]
        yield labelled(program, steps)


def labelled_rows(spec: PRMSpec, equals: int, trajectories: Iterable[Trajectory]) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, targets): a step's kind where its score is read, WRONG_DIGIT or RIGHT_DIGIT at the characters of its result, IGNORE
    elsewhere. `equals` is the id of "="; every character of a result must be a token of its own."""
    for trajectory in trajectories:
        ids, positions = spec.render(trajectory.problem, trajectory.steps)
        targets = [IGNORE] * len(ids)
        for position, kind, step in zip(positions, trajectory.kinds, trajectory.steps, strict=True):
            targets[position] = kind
            result = position - ids[position::-1].index(equals) + 1 if "=" in step else position
            for at, right in enumerate(_right_digits(step), start=result):
                targets[at] = RIGHT_DIGIT if right else WRONG_DIGIT
        yield ids, targets


def _right_digits(step: str) -> list[bool]:
    """For each character of a step's result, up to the first wrong one, whether it is what the step's own operation gives."""
    operation = stated_operation(step)
    value = apply(*operation[:3]) if operation else None
    if operation is None or value is None:
        return []
    found = []
    for stated, right in zip(step.rpartition("=")[2], str(value), strict=False):
        found.append(stated == right)
        if stated != right:
            break
    return found


def batches(rows: Iterable[tuple[list[int], list[int]]], *, batch_tokens: int, total_tokens: int, seed: int,
            pool_rows: int = 4096) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:  # fmt: skip
    """(ids [B, T], targets [B, T], real tokens) until `total_tokens` real tokens are spent; rows of a pool are sorted by length."""
    rng = random.Random(seed)
    source, spent = iter(rows), 0
    while spent < total_tokens:
        pool = sorted((row for _, row in zip(range(pool_rows), source, strict=False)), key=lambda row: len(row[0]))
        if not pool:
            return
        groups: dict[int, list] = {}
        for row in pool:
            groups.setdefault(-(-len(row[0]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, []).append(row)
        ready = []
        for length, members in groups.items():
            size = max(1, batch_tokens // length)
            ready += [(length, members[i : i + size]) for i in range(0, len(members) - size + 1, size)] or [(length, members)]
        rng.shuffle(ready)
        for length, members in ready:
            ids = torch.zeros(len(members), length, dtype=torch.long)
            targets = torch.full((len(members), length), IGNORE)
            for i, (row_ids, row_targets) in enumerate(members):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                targets[i, : len(row_targets)] = torch.tensor(row_targets)
            real = sum(len(row[0]) for row in members)
            spent += real
            yield ids, targets, real
            if spent >= total_tokens:
                return
