"""Token batches for training: problems and worked solutions as padded rows of similar length."""

import random
from collections.abc import Iterable, Iterator

import torch

from ..tasks.programs import STEP_END, Program, draw_programs, solve
from .recipe import LEVEL_MIX

IGNORE = -100
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


def batches(rows: Iterable[tuple[list[int], list]], *, batch_tokens: int, total_tokens: int, pad_target, pool_rows: int = 4096,
            seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:  # fmt: skip
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
            targets = torch.full((len(members), length), pad_target)
            for i, (row_ids, row_targets) in enumerate(members):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                targets[i, : len(row_targets)] = torch.tensor(row_targets)
            real = sum(len(row[0]) for row in members)
            spent += real
            yield ids, targets, real
            if spent >= total_tokens:
                return
