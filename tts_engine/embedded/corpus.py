"""Token batches for training: problems with worked solutions, and labelled trajectories, as padded rows of similar length."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..prm.spec import PRMSpec
from ..tasks.programs import STEP_END, Program, draw_programs, solve, step_labels
from .recipe import LEVEL_MIX

IGNORE = -100
FIRST_ERROR, GOOD, LATER_ERROR = 0, 1, 2  # what a step is to a PRM in training
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


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A solution, right or wrong, step by step without blank lines, with its exact labels."""

    problem: str
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


def labelled(program: Program, steps: Iterable[str]) -> Trajectory:
    steps = tuple(steps)
    return Trajectory(program.text, steps, tuple(step_labels(program, list(steps))))


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


def labelled_rows(spec: PRMSpec, trajectories: Iterable[Trajectory]) -> Iterator[tuple[list[int], list[int]]]:
    """(input ids, targets): FIRST_ERROR, GOOD or LATER_ERROR where a step's score is read, IGNORE elsewhere."""
    for trajectory in trajectories:
        ids, positions = spec.render(trajectory.problem, trajectory.steps)
        targets, hope = [IGNORE] * len(ids), True
        for position, label in zip(positions, trajectory.labels, strict=True):
            targets[position] = GOOD if label else FIRST_ERROR if hope else LATER_ERROR
            hope = label
        yield ids, targets


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
